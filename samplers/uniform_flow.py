"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): noise levels at which a straight flow's time is uniform."""

import torch

from .noise_levels import NoiseLevelSampler


class UniformFlowSampler(NoiseLevelSampler):
    """s ~ U(0, 1) in x = (1 - s) x_0 + s eps, carried to the discrete schedule by sigma = s / (1 - s).

    A uniform draw of the flow's time is not a uniform draw of t: in log sigma its density is s (1 - s). The loss that
    belongs to it is the flow's, `flow`.
    """

    def cumulative(self, log_sigma: torch.Tensor) -> torch.Tensor:
        return log_sigma.sigmoid()  # s
