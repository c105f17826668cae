"""EDM (Karras et al. 2022, arXiv 2206.00364, table 1): noise levels from a log-normal distribution."""

from typing import Any

import torch

from .checks import check_finite, check_positive
from .noise_levels import NoiseLevelSampler
from .schedule import NoiseSchedule


class LogNormalSampler(NoiseLevelSampler):
    """log sigma ~ N(p_mean, p_std^2), carried to the discrete schedule. EDM's loss weighting with it is `edm`.

    Args:
        p_mean, p_std: of log sigma, where sigma = sqrt((1 - abar) / abar) and images lie in [-1, 1].
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        **options: Any,
    ) -> None:
        check_finite(p_mean=p_mean)
        check_positive(p_std=p_std)
        self.p_mean, self.p_std = p_mean, p_std
        super().__init__(schedule, loss_weights, **options)

    def cumulative(self, log_sigma: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((log_sigma - self.p_mean) / self.p_std)
