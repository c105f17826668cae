"""A continuous distribution of noise levels, carried to the timesteps of a discrete schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .base import TimestepSampler
from .checks import check_shares
from .schedule import NoiseSchedule


class NoiseLevelSampler(TimestepSampler):
    """p_t is the mass of a distribution of log sigma between the midpoints to the neighbouring timesteps' log sigma.

    The distribution is truncated to the schedule's range. It is stated in sigma = sqrt((1 - abar) / abar), the ratio of
    noise to signal, which means the same for any process: of EDM's it is sigma itself, and of a straight flow,
    x = (1 - s) x_0 + s eps, it is s / (1 - s), so that log sigma = logit(s).

    A floor keeps every p_t positive; it is divided by the weight, because `edm` weighs the noisy end of the cosine
    schedule by 1e9. The density changes the objective: w_t is the loss weighting alone.

    Args:
        floor: total mass of the uniform part, before it is divided by the weight.

    Raises:
        ValueError: the distribution has no mass in the schedule's range.
    """

    def __init__(
        self, schedule: NoiseSchedule, loss_weights: torch.Tensor | None = None, *, floor: float = 1e-9, **options: Any
    ) -> None:
        check_shares(floor=floor)
        self.floor = floor
        super().__init__(schedule, loss_weights, **options)

    def cumulative(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """[N] float64 the distribution's mass below `log_sigma` [N], which may be infinite."""
        raise NotImplementedError

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        return self._masses(schedule, self.cumulative)

    def _masses(self, schedule: NoiseSchedule, cumulative: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        log_sigma = schedule.sigma.log()
        midpoints = (log_sigma[1:] + log_sigma[:-1]) / 2
        first = log_sigma[:1] - (midpoints[:1] - log_sigma[:1])
        last = 2 * log_sigma[-1:] - midpoints[-1:] if log_sigma[-1].isfinite() else log_sigma[-1:]
        mass = cumulative(torch.cat([first, midpoints, last])).diff()
        if not 0 < mass.sum() < math.inf:
            raise ValueError(
                f"this noise schedule has log sigma from {float(first):.3g} to {float(last):.3g}, where the "
                "distribution of noise levels has no mass: of log sigma, 0 is as much noise as signal"
            )
        floor = self.floor / schedule.num_train_timesteps / self.loss_weights.cpu().double().clamp_min(1.0)
        return mass / mass.sum() + floor
