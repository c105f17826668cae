"""A sampler under the name and the arguments of the function by which scripts that train flows draw."""

from collections.abc import Callable
from typing import Any

import torch

from .schedule import NoiseSchedule


class DropIn:
    """The part of a `TimestepSampler` that takes the place of a function of diffusers'."""

    _schedule: NoiseSchedule
    sample: Callable[..., Any]

    def compute_density_for_timestep_sampling(
        self,
        weighting_scheme: str | None,
        batch_size: int,
        logit_mean: float | None = None,
        logit_std: float | None = None,
        mode_scale: float | None = None,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """[B] float32 in (0, 1): what `sample` draws, as diffusers' function of this name gives it.

        `indices = (u * num_train_timesteps).long()`, the line that follows it in scripts, gives the timesteps: u is
        the middle of a timestep's share of [0, 1), so that no rounding leads to another. `weights_of` has the weights.

        Args:
            weighting_scheme: ignored, and the next three with it: the density is the sampler's.
            batch_size: B, of this process.
            device: of the result. On the CPU, as scripts ask for it, it waits for a GPU that draws.
            generator: as `sample` takes it: on the sampler's device, in the same state on all ranks.
        """
        timesteps = self.sample(batch_size, generator).timesteps
        return ((timesteps + 0.5) / self._schedule.whole.num_train_timesteps).to(device)
