"""All that training changes, in one object, which is what a checkpoint holds."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from pipelines import choose_kernels
from samplers import TimestepSampler, fold_seed

from .checkpoints import load_checkpoint, save_checkpoint, save_shared_weights_once
from .clock import PhaseClock
from .ema import WeightAverage
from .metrics import LossMeter
from .nonfinite import NonFiniteGuard, check_finite
from .optimizer import build_optimizer, override_settings
from .options import OptimizationOptions
from .output import OutputDir
from .resuming import Start
from .stopping import Budget


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        network, optimizer: prepared by `accelerator`.
        sampler: of timesteps.
        meter, guard: statistics since the last record of the log; updates that were not finite.
        images_per_step: of all processes together.
        max_grad_norm: to which gradients are clipped.
        made_for: settings of the network, and what identifies the images, for a run that goes on from here to compare.
        step, images: made and seen so far.
    """

    accelerator: Accelerator
    network: torch.nn.Module
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: WeightAverage
    sampler: TimestepSampler
    meter: LossMeter
    guard: NonFiniteGuard
    clock: PhaseClock
    images_per_step: int
    max_grad_norm: float
    made_for: dict[str, Any]
    step: int = 0
    images: int = 0

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def advance(self) -> None:
        """Count an update."""
        self.step += 1
        self.images += self.images_per_step

    def save(self, output: OutputDir, total_limit: int = 0) -> None:
        """Write `checkpoint-{step}`. All processes must call it.

        Args:
            total_limit: checkpoints to keep; older ones are deleted.

        Raises:
            FloatingPointError: weights are not finite.
            OSError: it could not be written.
        """
        with self.clock.phase("save"):
            check_finite(self.network.parameters(), f"weights of step {self.step:,}")
            check_finite(self.ema.shadow_params, f"averaged weights of step {self.step:,}")
            save_checkpoint(self.accelerator, output, self.step, self.process_state(), total_limit)

    def begin(self, start: Start, seed: int) -> None:
        """Go on from a checkpoint, with the optimiser's settings of this run; at the beginning, seed what dropout
        draws, which differs by process.

        Raises:
            ValueError: the checkpoint does not fit this run.
        """
        torch.manual_seed(fold_seed(seed, self.accelerator.process_index, stream=2))
        if not start.checkpoint:
            return
        settings = {name: self.optimizer.defaults[name] for name in ("lr", "betas", "weight_decay", "eps")}
        load_checkpoint(self.accelerator, start.checkpoint)
        override_settings(self.optimizer, self.lr_scheduler, settings)
        for name in ("sampler", "meter", "guard"):
            try:
                getattr(self, name).load_state_dict(start.process_state[name])
            except ValueError as error:
                raise ValueError(f"--resume_from_checkpoint {start.checkpoint}: {error}") from error
        self.step, self.images = start.step, start.images
        self.accelerator.print(f"resumed from {start.checkpoint}")

    def process_state(self) -> dict[str, Any]:
        """What accelerate does not save: of this process alone, as `Start.process_state` has it."""
        return {
            "step": self.step,
            "images": self.images,
            "seconds": self.clock.report(),
            "processes": self.accelerator.num_processes,
            **{name: getattr(self, name).state_dict() for name in ("sampler", "meter", "guard")},
            **self.made_for,
        }


def build_state(
    options: OptimizationOptions,
    accelerator: Accelerator,
    network: torch.nn.Module,
    sampler: TimestepSampler,
    data: dict[str, Any],
    clock: PhaseClock,
    budget: Budget | None = None,
) -> TrainingState:
    """The state at the beginning, with AdamW and the average of the weights.

    Args:
        network: moves to the accelerator's device.
        data: what tells the images, of `training.data.identify`.
        budget: over which the learning rate falls, if it does; None without an end.
    """
    optimizer, lr_scheduler = build_optimizer(options, network.to(accelerator.device), budget)
    choose_kernels(network, accelerator.device, accelerator.mixed_precision, options.compile)
    network, optimizer = accelerator.prepare(network, optimizer)
    ema = build_average(options, network)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    accelerator.register_save_state_pre_hook(save_shared_weights_once)
    is_scaled = accelerator.scaler is not None
    network_config = json.loads(accelerator.unwrap_model(network).to_json_string())
    return TrainingState(
        accelerator,
        network,
        optimizer,
        lr_scheduler,
        ema,
        sampler,
        meter=LossMeter(sampler.num_train_timesteps, accelerator.device),
        guard=NonFiniteGuard(optimizer.optimizer, accelerator.device, is_scaled, options.max_nonfinite_steps),
        clock=clock,
        images_per_step=options.images_per_process * accelerator.num_processes,
        max_grad_norm=options.max_grad_norm,
        made_for={"network": network_config, "data": data},
    )


def build_average(options: OptimizationOptions, network: torch.nn.Module) -> WeightAverage:
    """The average of a network's weights; the weights themselves without --use_ema."""
    return WeightAverage(
        network.parameters(),
        decay=options.ema_max_decay if options.use_ema else 0.0,
        use_ema_warmup=True,
        inv_gamma=options.ema_inv_gamma,
        power=options.ema_power,
    )
