"""Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section 3.1, eq. 19): a logit-normal distribution of t."""

from typing import Any

import torch

from .checks import check_finite, check_positive
from .log_normal import LogNormalSampler
from .schedule import NoiseSchedule


class LogitNormalSampler(LogNormalSampler):
    """pi_ln(t; m, s) = exp(-(logit(t) - m)^2 / (2 s^2)) / (s sqrt(2 pi) t (1 - t)), by noise level.

    The paper's t in (0, 1) is the time of a straight flow, x = (1 - t) x_0 + t eps, whose ratio of noise to signal is
    sigma = t / (1 - t). So logit(t) = log sigma, and what the density says of noise levels is log sigma ~ N(m, s^2).
    The paper's loss is that of the flow's velocity, unweighted: `flow`.

    Args:
        m: location, in units of log sigma: 0 is as much noise as signal, above it is noisier.
        s: scale.
    """

    settled_options = frozenset({"p_mean", "p_std"})

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        m: float = 0.0,
        s: float = 1.0,
        **options: Any,
    ) -> None:
        check_finite(m=m)
        check_positive(s=s)
        super().__init__(schedule, loss_weights, p_mean=m, p_std=s, **options)
