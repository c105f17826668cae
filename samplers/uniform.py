"""DDPM (Ho et al. 2020, arXiv 2006.11239): every timestep equally often."""

from .base import TimestepSampler


class UniformSampler(TimestepSampler):
    """p_t = 1 / T; w_t = the loss weighting."""
