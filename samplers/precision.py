"""In which precision a device can compute."""

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where that is all there is: on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64
