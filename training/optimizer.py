"""AdamW, and its learning rate over the run."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from .options import OptimizationOptions
from .stopping import TICKS, Budget


def build_optimizer(
    options: OptimizationOptions, network: torch.nn.Module, budget: Budget | None = None
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW of a network on its device, and the schedule of its learning rate over the budget, None without an end."""
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,  # which `NonFiniteGuard` needs
    )
    return optimizer, build_lr_scheduler(options, optimizer, budget)


def build_lr_scheduler(
    options: OptimizationOptions, optimizer: torch.optim.Optimizer, budget: Budget | None
) -> LambdaLR:
    """diffusers' schedule of this name over the budget's steps. In a budget of time, whose steps nobody can count
    beforehand, it falls with the share of the time that is spent, from the first second, and warm-up is a factor. Of a
    budget of both it is at each step the lower one, whichever limit will end the run.

    Raises:
        ValueError: it falls, and there is no budget; or it cannot be with this warm-up.
    """
    name, warmup = options.lr_scheduler, options.lr_warmup_steps
    max_steps, max_seconds = (None, None) if budget is None else (budget.max_steps, budget.max_seconds)
    if name.startswith("constant"):
        return get_scheduler(name, optimizer, num_warmup_steps=warmup)
    if max_steps is None and max_seconds is None:
        raise ValueError(f"--lr_scheduler {name}: falls to the end of a run, and here no run has one")
    if max_steps is not None:
        options.check_warmup(max_steps)  # of a number of epochs it was not known before

    def over(steps: int, warmup: int) -> Callable[[float], float]:
        (factor,) = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas
        return factor

    factors = []
    if max_steps is not None:
        factors.append(over(max_steps, warmup))
    if max_seconds is not None:
        fall = over(TICKS, 0)
        factors.append(lambda step: min(step / warmup if warmup else 1.0, 1.0) * fall(TICKS * budget.share_of_time))
    return LambdaLR(optimizer, lambda step: min(factor(step) for factor in factors))


def override_settings(
    optimizer: AcceleratedOptimizer, lr_scheduler: torch.optim.lr_scheduler.LRScheduler, settings: dict[str, Any]
) -> None:
    """Let flags override what a checkpoint has brought of the optimiser's settings, and keep its state."""
    for group in optimizer.param_groups:
        group.update(settings, initial_lr=settings["lr"])
    lr_scheduler.base_lrs = [settings["lr"]] * len(lr_scheduler.lr_lambdas)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = settings["lr"] * factor(lr_scheduler.last_epoch)
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # for a log before the first update
