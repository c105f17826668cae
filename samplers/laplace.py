"""Improved Noise Schedule for Diffusion Training (Hang et al. 2024, arXiv 2407.03297): a Laplace log-SNR."""

from typing import Any

import torch

from .checks import check_finite, check_positive
from .noise_levels import NoiseLevelSampler
from .schedule import NoiseSchedule


class LaplaceSampler(NoiseLevelSampler):
    """p(lambda) = exp(-|lambda - mu| / b) / (2 b), lambda = log snr = -2 log sigma, carried to the discrete schedule.

    Most draws are where signal and noise are as strong. The paper makes a noise schedule of it, lambda(t) = mu - b
    sgn(1/2 - t) ln(1 - 2 |t - 1/2|) for t uniform in (0, 1), which draws the same noise levels.

    The paper's loss is the plain one of what the network predicts: with eps that is `none`. Its best result is with v,
    whose plain loss has the weight 1 / abar_t on that of eps. (No code by the authors was found, and of the text a
    summary was at hand, with these formulas and numbers.)

    Args:
        mu: location, in log-SNR; above 0 is less noise than signal.
        b: scale, positive; the paper's for images of 256 x 256 pixels (0.75 for 512 x 512).
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        mu: float = 0.0,
        b: float = 0.5,
        **options: Any,
    ) -> None:
        check_finite(mu=mu)
        check_positive(b=b)
        self.mu, self.b = mu, b
        super().__init__(schedule, loss_weights, **options)

    def cumulative(self, log_sigma: torch.Tensor) -> torch.Tensor:
        z = (2 * log_sigma + self.mu) / self.b  # rises with the noise
        tail = torch.exp(-z.abs()) / 2
        return torch.where(z < 0, tail, 1 - tail)
