"""What a run would be, without its being one."""

import time
from collections.abc import Callable
from datetime import timedelta

import psutil
import torch

from images import ImageBatches

from .options import TrainingOptions
from .state import TrainingState

TIMED_STEPS = 3


def dry_run(
    options: TrainingOptions,
    state: TrainingState,
    batches: ImageBatches,
    max_steps: int | None,
    train_step: Callable[[torch.Tensor], None],
) -> None:
    """Make a step that warms up and three that are timed, and print what the run would be. All processes must call it.

    Args:
        train_step: makes an update from the images [B, C, H, W] of a step.
    """
    begun = state.step
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        train_step(next(batches))
        if state.accelerator.device.type == "cuda":
            torch.cuda.synchronize(state.accelerator.device)
        seconds.append(time.perf_counter() - start)
    per_step = sum(seconds[1:]) / TIMED_STEPS
    lines = {
        "network": f"{state.num_parameters / 1e6:,.2f} M parameters",
        "data": f"{batches.num_images:,} images an epoch, {options.resolution}x{options.resolution}, "
        f"placed: {batches.placement}",
        "batch": f"{options.train_batch_size} x {options.gradient_accumulation_steps} accumulated x "
        f"{state.accelerator.num_processes} processes = {state.images_per_step:,} images a step",
        "method": f"{options.method}: {type(state.sampler).__name__}",
        "precision": f"{state.accelerator.mixed_precision}{', compiled' if options.compile else ''}",
        "step": f"{per_step:.4g} s (mean of {TIMED_STEPS}), {state.images_per_step / per_step:,.4g} images/s",
        "memory": used_memory(state.accelerator.device),
        "run": budget(options, max_steps, begun, per_step, batches.num_images / state.images_per_step),
    }
    for name, text in lines.items():
        state.accelerator.print(f"{name:10} {text}")
    state.accelerator.print("a dry run: nothing was written")


def budget(
    options: TrainingOptions, max_steps: int | None, begun: int, seconds_per_step: float, steps_per_epoch: float
) -> str:
    """How many steps, epochs and hours are to come, in words."""
    steps_by_time = options.max_train_seconds / seconds_per_step if options.max_train_seconds else float("inf")
    steps = min(max_steps - begun if max_steps is not None else float("inf"), steps_by_time)
    time_left = timedelta(seconds=round(steps * seconds_per_step))
    from_where = f" from step {begun:,}" if begun else ""
    return f"about {steps:,.0f} steps{from_where}, {steps / steps_per_epoch:,.1f} epochs, {time_left} of training"


def used_memory(device: torch.device) -> str:
    """Of the GPU at its peak, or of this process on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of the GPU's at the peak"
    return f"{psutil.Process().memory_info().rss / 2**20:,.0f} MiB in use by this process"
