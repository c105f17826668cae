"""What a run's numbers depend on beside its options."""

import platform
from importlib.metadata import version

import torch


def library_versions() -> dict[str, str]:
    """{package: version} of what decides speed and numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "accelerate")}


def device_name(device: torch.device) -> str:
    """The processor as a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
