"""A network's weights: which, and whether they are finite."""

import hashlib
from collections.abc import Iterable

import torch


def are_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """bool [N] on their device: whether each of N tensors is free of NaN and infinity."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors])


def nonfinite_weights(module: torch.nn.Module) -> list[str]:
    """The names of the parameters and buffers that hold a NaN or an infinity. Waits for the device, once."""
    weights = module.state_dict()
    return [
        name for name, is_finite in zip(weights, are_finite(weights.values()).tolist(), strict=True) if not is_finite
    ]


def hash_weights(module: torch.nn.Module, prefix: str = "") -> str:
    """SHA-256 of `prefix`, and of the names and values of a module's parameters and buffers."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
