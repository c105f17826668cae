"""EDM (Karras et al. 2022, arXiv 2206.00364, table 1): noise levels from a log-normal distribution."""

from typing import Any

import torch

from .base import TimestepSampler
from .schedule import NoiseSchedule


class LogNormalSampler(TimestepSampler):
    """log sigma ~ N(p_mean, p_std^2), carried to the discrete schedule and truncated to its range.

    p_t is the normal's mass between the midpoints to the neighbouring timesteps' log sigma. A floor keeps
    every p_t positive; it is divided by the weight, because `edm` weighs the noisy end by up to 1e18.
    The density changes the objective: w_t is the loss weighting alone (EDM's is `edm`).

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
        floor: float = 1e-9,
        **options: Any,
    ) -> None:
        self.p_mean, self.p_std, self.floor = p_mean, p_std, floor
        super().__init__(schedule, loss_weights, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        log_sigma = schedule.sigma.log()
        midpoints = (log_sigma[1:] + log_sigma[:-1]) / 2
        first = log_sigma[:1] - (midpoints[:1] - log_sigma[:1])
        last = 2 * log_sigma[-1:] - midpoints[-1:] if log_sigma[-1].isfinite() else log_sigma[-1:]
        edges = torch.cat([first, midpoints, last])
        mass = torch.special.ndtr((edges - self.p_mean) / self.p_std).diff()
        floor = self.floor / schedule.num_train_timesteps / self.loss_weights.cpu().double().clamp_min(1.0)
        return mass / mass.sum() + floor
