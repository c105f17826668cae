"""Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section 3.1, eq. 19): a logit-normal distribution of t."""

from typing import Any

import torch

from .base import TimestepSampler
from .schedule import NoiseSchedule


class LogitNormalSampler(TimestepSampler):
    """pi_ln(t; m, s) = exp(-(logit(t) - m)^2 / (2 s^2)) / (s sqrt(2 pi) t (1 - t)), in t / T. Touches p_t alone.

    p_t is the distribution's mass over the t-th of T equal intervals of (0, 1). The density changes the objective: w_t
    is the loss weighting alone, and the paper's with this density is `none`.

    Where this departs from the paper:
    - its t belongs to a straight flow, x_t = (1 - t) x_0 + t eps, where logit(t) = log sigma. Here it is t / T of
      whatever noise schedule is in use, which is how the density is carried over to DDPM. By noise level rather than
      by index it would be `log_normal` with p_mean = m and p_std = s.
    - a floor keeps p_t positive at both ends, where the density vanishes; as `log_normal`'s.

    Args:
        m: location, in units of logit(t): 0 is the middle, above it is noisier.
        s: scale.
        floor: total mass of the uniform part, before it is divided by the weight.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        m: float = 0.0,
        s: float = 1.0,
        floor: float = 1e-9,
        **options: Any,
    ) -> None:
        self.m, self.s, self.floor = m, s, floor
        super().__init__(schedule, loss_weights, **options)

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        T = schedule.num_train_timesteps
        edges = (torch.arange(T + 1, dtype=torch.float64) / T).logit()
        mass = torch.special.ndtr((edges - self.m) / self.s).diff()
        return mass + self.floor / T / self.loss_weights.cpu().double().clamp_min(1.0)
