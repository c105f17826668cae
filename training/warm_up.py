"""What takes longer in the first step than in others, over before the clock starts."""

import torch

from .denoiser import Denoiser
from .state import TrainingState


def warm_up_if_slow(
    state: TrainingState, denoiser: Denoiser, image_shape: tuple[int, ...], batch_size: int, is_compiled: bool
) -> None:
    """`warm_up` where the first step takes longer than others, on a clock of its own."""
    accelerator = state.accelerator
    if is_compiled or accelerator.device.type == "cuda" or accelerator.num_processes > 1:
        with state.clock.phase("warm_up"):
            warm_up(state, denoiser, image_shape, batch_size)


def warm_up(state: TrainingState, denoiser: Denoiser, image_shape: tuple[int, ...], batch_size: int) -> None:
    """Run the network and the sampler's losses forward and backward on noise, so that what the first step takes longer
    for is over before the clock starts; without gradients too, if the sampler measures the network. Leaves weights,
    gradients and random states as they were.

    That is compilation, autotuning, and DDP's buckets, which settle after the first step, and with them the order of
    its sums: then it must not be a step of the run.
    """
    device, sampler = state.accelerator.device, state.sampler
    timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(2):
            images = torch.randn(batch_size, *image_shape, device=device)
            sampler.losses_of_epsilon(denoiser.epsilon_errors(images, images, timesteps), timesteps).mean().backward()
        if sampler.measures_model:
            denoiser.epsilon_losses(images, images, timesteps)
    state.network.zero_grad(set_to_none=True)
