"""Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section 3.1, eq. 20): mode sampling with heavy tails."""

import math
from typing import Any

import torch

from .noise_levels import NoiseLevelSampler
from .schedule import NoiseSchedule

BISECTIONS = 60  # to the last bit of a double


class ModeSampler(NoiseLevelSampler):
    """s = f(u) = 1 - u - mode_scale (cos^2(pi u / 2) - 1 + u), u ~ U(0, 1), carried to the discrete schedule.

    s is the time of a straight flow, x = (1 - s) x_0 + s eps, as for `logit_normal`: sigma = s / (1 - s). f falls from
    1 to 0, so the mass below s is 1 - f^-1(s). Unlike a logit-normal, the density does not vanish at the ends. The
    paper's loss is that of the flow's velocity, unweighted: `flow`.

    Args:
        mode_scale: in [-1, 2 / (pi - 2)]; above 0 the middle is drawn more often, at 0 s is uniform. 1.29 is the
            default of diffusers' training scripts, and among the paper's.

    Raises:
        ValueError: at another mode_scale, f does not fall everywhere.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        mode_scale: float = 1.29,
        **options: Any,
    ) -> None:
        if not -1 <= mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"mode_scale must be in [-1, {2 / (math.pi - 2):.4g}], not {mode_scale}")
        self.mode_scale = mode_scale
        super().__init__(schedule, loss_weights, **options)

    def cumulative(self, log_sigma: torch.Tensor) -> torch.Tensor:
        rest = (-log_sigma).sigmoid()  # 1 - s
        low, high = torch.zeros_like(rest), torch.ones_like(rest)  # u is between them
        for _ in range(BISECTIONS):
            u = (low + high) / 2
            noisier = u + self.mode_scale * ((torch.pi * u / 2).cos() ** 2 - 1 + u) < rest
            low, high = torch.where(noisier, u, low), torch.where(noisier, high, u)
        return 1 - low
