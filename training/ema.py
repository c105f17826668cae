"""The average of the weights, which is what is sampled from and saved."""

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
        return {**super().state_dict(), "shadow_params": [whole(tensor) for tensor in self.shadow_params]}

    def load_state_dict(self, state_dict):
        """As `EMAModel`'s; the average stays on the devices, and in the shards, where it is."""
        placed = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [placed_like(new, old) for new, old in zip(self.shadow_params, placed, strict=True)]


def whole(tensor):
    """A tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor, example):
    """A tensor on the device of another, and sharded as that is."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor):
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor
