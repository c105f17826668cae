"""Several processes: which of them this is, and what they agree on."""

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def of_first_rank(value: Value) -> Value:
    """The first rank's `value`, on all of them."""
    values = [value]
    if rank_and_world_size()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]
