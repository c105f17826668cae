"""What a run would be, without its being one."""

import dataclasses
import time
from collections.abc import Callable

import psutil
import torch

from images import ImageBatches

from .methods import flags_of_parts
from .options import TrainingOptions
from .state import TrainingState
from .stopping import Budget

TIMED_STEPS = 3


def dry_run(
    options: TrainingOptions,
    state: TrainingState,
    batches: ImageBatches,
    budget: Budget,
    train_step: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Make a step that warms up and three that are timed, and print what the run would be. All processes must call it.

    Args:
        train_step: makes an update from the images [B, C, H, W] and labels [B] of a step.
    """
    begun, seconds = dataclasses.replace(state), []
    if state.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(state.accelerator.device)
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        train_step(*next(batches))
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
        "method": " ".join([f"{options.method}: {type(state.sampler).__name__}", *flags_of_parts(options)]),
        "precision": f"{state.accelerator.mixed_precision}{', compiled' if options.compile else ''}",
        "step": f"{per_step:.4g} s (mean of {TIMED_STEPS}), {state.images_per_step / per_step:,.4g} images/s",
        "memory": used_memory(state.accelerator.device),
        "run": what_is_left(budget, begun, per_step, batches.num_images),
    }
    for name, text in lines.items():
        state.accelerator.print(f"{name:10} {text}")
    latents = ", but for the latents, which the run itself will find" if options.vae else ""
    state.accelerator.print(f"a dry run: nothing was written{latents}")


def what_is_left(budget: Budget, state: TrainingState, seconds_per_step: float, images_per_epoch: int) -> str:
    """How many steps and how much time are to come, in words; `state` is that of the beginning."""
    limits = []
    if budget.max_steps is not None:
        limits.append(budget.max_steps - state.step)
    if budget.max_seconds is not None:
        limits.append((budget.max_seconds - state.clock.seconds("train")) / seconds_per_step)
    steps = max(min(limits), 0)
    epochs = steps * state.images_per_step / images_per_epoch
    from_where = f" from step {state.step:,} on" if state.step else ""
    return f"about {steps:,.0f} steps{from_where}, {epochs:,.1f} epochs, {hours(steps * seconds_per_step)} of training"


def hours(seconds: float) -> str:
    """H:MM:SS, however many hours."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{seconds:02}"


def used_memory(device: torch.device) -> str:
    """Of the GPU at its peak, or of this process on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of the GPU's at the peak"
    return f"{psutil.Process().memory_info().rss / 2**20:,.0f} MiB in use by this process"
