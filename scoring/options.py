"""The options of evaluate.py: named, explained, and checked as far as that goes without the images."""

import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from recipes import check_ranges
from scoring.feature_extractors import INCEPTION

METRICS = ("fid", "kid", "isc", "prc")
RESULT_FILE = "metrics.json"
RANGES = {
    "num_images1": "[1, inf)",
    "num_images2": "[1, inf)",
    "resolution": "[1, 2**16]",
    "batch_size": "[1, inf)",
    "seed": "[0, 2**32)",
    "kid_subsets": "[1, inf)",
    "kid_subset_size": "[1, inf)",
    "isc_splits": "[1, inf)",
    "prc_neighborhood": "[1, inf)",
    "prc_batch_size": "[1, inf)",
}


@dataclass
class ComparisonOptions:
    """Images are named as for training; 1 is the generated set and 2 the reference."""

    _argument_group_name = "Comparison: 1 is the generated set, 2 the reference"

    config: str | None = HfArg(default=None, help="A recipe (YAML) of these options; flags override it.")
    input1: str | None = HfArg(default=None, help="Generated images: any folder, an .npz or a data set; required.")
    input2: str | None = HfArg(default=None, help="Reference images, likewise; a Hub name, or 'digits'; required.")
    output_dir: str | None = HfArg(default=None, help=f"Where {RESULT_FILE} goes; required.")
    overwrite_output_dir: bool = HfArg(default=False, help=f"Replace the {RESULT_FILE} in --output_dir.")
    metrics: list[str] | None = field(
        default=None, metadata={"help": f"Of {' '.join(METRICS)}; default: all that apply to the feature extractor."}
    )


@dataclass
class ImageOptions:
    """Which of the images, and how they are read."""

    _argument_group_name = "Images"

    split1: str = HfArg(default="train", help="Of --input1; also a slice such as train[:1000].")
    split2: str = HfArg(default="train", help="Of --input2.")
    dataset_config_name1: str | None = HfArg(default=None, help="Configuration of --input1, if it has several.")
    dataset_config_name2: str | None = HfArg(default=None, help="Configuration of --input2.")
    image_column1: str | None = HfArg(default=None, help="Needed only if --input1 has several image columns.")
    image_column2: str | None = HfArg(default=None, help="Needed only if --input2 has several image columns.")
    white_level1: float | None = HfArg(
        default=None, help="White in grey images of --input1 of more than 8 bits or of floats; default: by their range."
    )
    white_level2: float | None = HfArg(default=None, help="Likewise of --input2.")
    num_images1: int | None = HfArg(default=None, help="A random subset of --input1; default: all.")
    num_images2: int | None = HfArg(default=None, help="A random subset of --input2; default: all.")
    resolution: int | None = HfArg(default=None, help="Resize and crop both; default: the size of the first image.")
    image_mode: Literal["RGB", "L"] = HfArg(default="RGB", help="L makes all images grey first.")
    on_bad_image: Literal["error", "skip"] = HfArg(default="error", help="What to do about an unreadable image.")
    cache_dir: str | None = HfArg(
        default=None,
        aliases=["--dataset_cache_dir", "--dataset-cache-dir"],
        help="Where downloaded data sets are kept.",
    )


@dataclass
class FeatureOptions:
    """What the images are compared by."""

    _argument_group_name = "Features"

    feature_extractor: str = HfArg(default=INCEPTION, help="Or a `transformers` vision model: Hub name or folder.")
    feature_extractor_weights: str | None = HfArg(default=None, help="Inception's; default: downloaded once.")
    batch_size: int = HfArg(default=64, help="Images per forward pass.")
    device: str | None = HfArg(default=None, help="cpu, cuda or cuda:N; default: cuda if there is one.")
    features_cache_dir: str | None = HfArg(
        default=None, help="Where reference features are kept; default: torch-fidelity's."
    )


@dataclass
class MetricOptions:
    """How the features are compared; the defaults are torch-fidelity's."""

    _argument_group_name = "Metrics"

    seed: int = HfArg(default=2020, help="Of random subsets, and of the subsets of KID and the splits of ISC.")
    kid_subsets: int = HfArg(default=100, help="KID is the mean over so many subsets ...")
    kid_subset_size: int = HfArg(default=1000, help="... of so many images.")
    isc_splits: int = HfArg(default=10, help="Parts whose Inception Scores are averaged.")
    prc_neighborhood: int = HfArg(default=3, help="k: a ball reaches to the k-th nearest neighbour.")
    prc_batch_size: int = HfArg(default=10_000, help="Rows and columns of the distance matrix at a time.")
    allow_few_images: bool = HfArg(default=False, help="Allow a Fréchet distance from no more images than features.")


@dataclass
class EvaluationOptions(ComparisonOptions, ImageOptions, FeatureOptions, MetricOptions):
    """All of a run's."""

    _recipe_block = "evaluate"

    def __post_init__(self):
        for name in ("input1", "input2", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is required (--help lists the flags)")
        check_ranges(self, RANGES)
        self.device = check_device(self.device)
        is_inception = self.feature_extractor == INCEPTION
        self.metrics = self.metrics or [name for name in METRICS if is_inception or name != "isc"]
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"--metrics {name}: must be of {', '.join(METRICS)}")
        if "isc" in self.metrics and not is_inception:
            raise ValueError(
                f"--metrics isc: the Inception Score needs --feature_extractor {INCEPTION}, "
                f"not {self.feature_extractor}"
            )


def check_device(name: str | None) -> str:
    """The name of the device to compute on. Raises ValueError if there is no such device."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    number = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if number is None:
        raise ValueError(f"--device {name}: must be cpu, cuda or cuda:N")
    if name != "cpu" and int(number[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return name
