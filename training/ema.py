"""The average of the weights, which is what is sampled from and saved."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(EMAModel):
    """diffusers' `EMAModel`, whose state is that of whole tensors even where the weights are sharded (FSDP2), so that
    `accelerator.register_for_checkpointing` saves it once and any number of processes can take it up."""

    def step(self, parameters):
        """As `EMAModel`'s, in one pass over the weights instead of two. All are trained, and of the average's type."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        get_ema_multi_avg_fn(self.cur_decay_value)(self.shadow_params, list(parameters), None)

    def state_dict(self):
        """As `EMAModel`'s. With sharded weights a collective: all processes must call it."""
        return {**super().state_dict(), "shadow_params": [full_tensor(tensor) for tensor in self.shadow_params]}

    def load_state_dict(self, state_dict):
        """As `EMAModel`'s; the average stays on the devices, and in the shards, where it is."""
        placed = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [placed_like(new, old) for new, old in zip(self.shadow_params, placed, strict=True)]


def averaged_pipeline(
    accelerator: Accelerator, network: torch.nn.Module, ema: WeightAverage, noise_scheduler: DDPMScheduler
) -> DDPMPipeline:
    """A `DDPMPipeline` of the averaged weights. All processes must call it.

    Raises:
        FloatingPointError: the average is not finite.
    """
    model = accelerator.unwrap_model(network)
    names = (name for name, _ in model.named_parameters())
    weights = {name: full_tensor(tensor) for name, tensor in zip(names, ema.shadow_params, strict=True)}
    check_finite(weights.values(), "averaged weights")
    with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, must not move the run's dropout
        average = UNet2DModel.from_config(model.config)
    average.load_state_dict(weights)
    return DDPMPipeline(average.eval(), DDPMScheduler.from_config(noise_scheduler.config))


def check_finite(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Refuse weights that are not finite: nothing good can be saved of them, or sampled with them.

    Raises:
        FloatingPointError: on all processes alike.
    """
    is_finite = torch.stack([full_tensor(tensor.detach()).isfinite().all() for tensor in tensors]).all().float()
    if torch.distributed.is_initialized():  # shards may differ
        torch.distributed.all_reduce(is_finite, torch.distributed.ReduceOp.MIN)
    if not is_finite:
        raise FloatingPointError(f"the {what} are not finite, and are not saved")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A tensor on the device of another, and sharded as that is."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor):
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor
