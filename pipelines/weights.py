"""A network's weights: which, and whether they are finite."""

import hashlib
from collections.abc import Iterable

import torch


def nonfinite_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """The names of those of (name, tensor) that hold a NaN or an infinity. Waits for the device once."""
    names, are_finite = [], []
    for name, tensor in weights:
        names.append(name)
        are_finite.append(tensor.isfinite().all())
    if not names:
        return []
    return [name for name, is_finite in zip(names, torch.stack(are_finite).tolist(), strict=True) if not is_finite]


def hash_weights(module: torch.nn.Module, prefix: str = "") -> str:
    """SHA-256 of `prefix`, and of the names and values of a module's parameters and buffers."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
