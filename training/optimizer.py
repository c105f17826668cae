"""AdamW, and its learning rate over the run."""

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from .options import OptimizationOptions
from .stopping import Budget

SHARES = 10**6  # of a budget, which take the place of updates in diffusers' schedules


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
    """diffusers' schedule of this name. In a budget of time, whose updates nobody can count beforehand, the learning
    rate falls with the share of the budget that is spent, and the warm-up is a factor of its own."""
    name, warmup = options.lr_scheduler, options.lr_warmup_steps
    if name.startswith("constant") or budget is None or budget.max_seconds is None:
        steps = budget and budget.max_steps
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    (rise,) = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=warmup).lr_lambdas
    (fall,) = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=SHARES).lr_lambdas
    return LambdaLR(optimizer, lambda step: rise(step) * fall(SHARES * budget.spent(step)))


def override_settings(
    optimizer: AcceleratedOptimizer, lr_scheduler: torch.optim.lr_scheduler.LRScheduler, settings: dict[str, Any]
) -> None:
    """Let flags override what a checkpoint has brought of the optimiser's settings, and keep its state."""
    for group in optimizer.param_groups:
        group.update(settings, initial_lr=settings["lr"])
    lr_scheduler.base_lrs = [settings["lr"]] * len(lr_scheduler.lr_lambdas)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = settings["lr"] * factor(lr_scheduler.last_epoch)
