"""Tensors that may be sharded over the processes (FSDP2)."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A tensor on the device of another, and sharded as that is."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor):
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor
