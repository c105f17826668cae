"""Parameters and memory of training steps, from shapes alone: no data, no weights, no hardware.

    python benchmarks/training_memory.py --output_json training_memory.json

Networks are on the meta device, which computes nothing. Bytes are of float32; see training/memory.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_record

from recipes import one_line_errors, parse_options
from training.machine import library_versions, this_command
from training.memory import COPIES, activation_memory
from training.network import network_config, network_on_meta
from training.options import TrainingOptions
from training.saving import write_json

CASES = {  # name: (--model, batch size, channels, side)
    "DiT-S/2, 32 latents of 4x32x32": ("DiT-S/2", 32, 4, 32),
    "DiT-XL/2, 32 latents of 4x32x32": ("DiT-XL/2", 32, 4, 32),
    "U-Net, 16 images of 3x64x64": ("unet", 16, 3, 64),
}


@dataclass
class MemoryOptions:
    """Options of benchmarks/training_memory.py."""

    output_json: str | None = HfArg(default=None, help="New file of the numbers.")


def main(options: MemoryOptions) -> None:
    with one_line_errors(ValueError, OSError):
        check_new_record(options.output_json)
        networks = {name: measure(*case) for name, case in CASES.items()}
        for name, numbers in networks.items():
            print(f"{name}:", ", ".join(f"{what} {number:,}" for what, number in numbers.items()))
        if options.output_json:
            device = "none: shapes alone, on PyTorch's meta device; nothing is drawn at random"
            record = {"networks": networks, "device": device, "versions": library_versions(), "command": this_command()}
            write_json(record, Path(options.output_json))


def measure(model: str, batch_size: int, channels: int, side: int) -> dict[str, int]:
    """{"parameters", "bytes_of_weights_and_the_like", "bytes_of_activations", those with gradient checkpointing}."""
    network = network_on_meta(network_config(TrainingOptions(model=model), channels, side)).train()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    numbers = {"parameters": parameters, "bytes_of_weights_and_the_like": 4 * COPIES * parameters}
    numbers["bytes_of_activations"] = activation_memory(network, (channels, side, side), batch_size)
    network.enable_gradient_checkpointing()
    numbers["bytes_with_gradient_checkpointing"] = activation_memory(network, (channels, side, side), batch_size)
    return numbers


if __name__ == "__main__":
    main(parse_options(MemoryOptions))
