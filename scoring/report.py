"""The scores for people, with what to bear in mind, and the machine that they were computed on."""

import platform
from collections.abc import Sequence
from typing import Any

import torch

from images import ImageDataset
from scoring.feature_extractors import INCEPTION, INCEPTION_SHA256
from scoring.fidelity import scoring_library_versions

FEW_IMAGES = 10_000


def describe_machine(device: str) -> dict[str, Any]:
    """What the scores were computed on, and by which versions."""
    is_cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"cpu, {platform.machine()}",
        "tf32_convolutions": is_cuda and torch.backends.cudnn.allow_tf32,
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **scoring_library_versions()},
    }


def print_inputs(inputs: Sequence[ImageDataset]) -> None:
    """One line an input: how many images there are, of what, and what was left out."""
    for number, images in enumerate(inputs, 1):
        print(f"--input{number}: {images.describe()}")


def print_table(record: dict[str, Any]) -> None:
    """One line a metric, and what to bear in mind."""
    first, second, extractor = record["input1"], record["input2"], record["feature_extractor"]
    print(f"{first['num_images']:,} images of {first['name']}")
    print(f"against {second['num_images']:,} of {second['name']}, split {second['split']}")
    print(f"by {extractor['num_features']} features of {extractor['model']}: {extractor['features']}")
    for name, value in record["values"].items():
        if not name.endswith("_std"):
            spread = record["values"].get(f"{name}_std")
            print(f"  {name:16}{value:12.6g}" + (f" ± {spread:.3g}" if spread is not None else ""))
    fewest = min(first["num_images"], second["num_images"])
    if extractor["model"] == INCEPTION and extractor["weights_sha256"] != INCEPTION_SHA256:
        print("caution: these are not torch-fidelity's weights of Inception; do not compare with published scores")
    if "fid" in record["options"]["metrics"] and fewest < FEW_IMAGES:
        print(
            f"caution: a Fréchet distance from fewer than {FEW_IMAGES:,} images ({fewest:,} here) is biased upwards; "
            "compare it only with one from as many"
        )
