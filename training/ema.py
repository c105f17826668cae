"""The average of the weights, which is what is sampled from and saved."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipelines import Network

from .network import class_of
from .nonfinite import check_finite
from .sharding import full_tensor, placed_like


class WeightAverage(EMAModel):
    """diffusers' `EMAModel`, whose state is that of whole tensors even where the weights are sharded (FSDP2), so that
    `accelerator.register_for_checkpointing` saves it once and any number of processes can take it up."""

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """As `EMAModel`'s, in one pass over the weights instead of two. All are trained, and of the average's type."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        get_ema_multi_avg_fn(self.cur_decay_value)(self.shadow_params, list(parameters), None)

    def state_dict(self) -> dict[str, Any]:
        """As `EMAModel`'s. With sharded weights a collective: all processes must call it."""
        return {**super().state_dict(), "shadow_params": [full_tensor(tensor) for tensor in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `EMAModel`'s, but for the settings, which stay those that it was made with, by this run's flags. The
        average stays on the devices, and in the shards, where it is."""
        placed = self.shadow_params
        super().load_state_dict({name: state_dict[name] for name in ("optimization_step", "shadow_params")})
        self.shadow_params = [placed_like(new, old) for new, old in zip(self.shadow_params, placed, strict=True)]


def averaged_network(accelerator: Accelerator, network: torch.nn.Module, ema: WeightAverage) -> Network:
    """A network of diffusers' class with the averaged weights, in evaluation mode. All processes must call it.

    Weights that several layers share in training are copies in it, as diffusers' class has them.

    Raises:
        FloatingPointError: the average is not finite.
    """
    model = accelerator.unwrap_model(network)
    averages = {
        id(parameter): full_tensor(tensor)
        for parameter, tensor in zip(model.parameters(), ema.shadow_params, strict=True)
    }
    check_finite(averages.values(), "averaged weights")
    with torch.random.fork_rng(devices=[]):  # initial weights, soon overwritten, must not move the run's dropout
        average = class_of(model.config).from_config(model.config)  # FSDP2 changes the type of a model
    average.load_state_dict({name: averages[id(p)] for name, p in model.named_parameters(remove_duplicate=False)})
    return average.eval()
