"""torch-fidelity's metrics of two sets of images in memory, under names that say what may be compared."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
import torchvision
import transformers
from tqdm.auto import tqdm

from progress import progress_bar
from scoring.feature_extractors import Extractor
from scoring.inputs import fingerprint
from scoring.options import METRICS, EvaluationOptions

RESULT_NAMES = {  # torch-fidelity's: (ours with its Inception weights, ours with any others)
    torch_fidelity.KEY_METRIC_FID: ("fid", "fd"),
    torch_fidelity.KEY_METRIC_KID_MEAN: ("kid", "kd"),
    torch_fidelity.KEY_METRIC_KID_STD: ("kid_std", "kd_std"),
    torch_fidelity.KEY_METRIC_ISC_MEAN: ("inception_score", "inception_score"),
    torch_fidelity.KEY_METRIC_ISC_STD: ("inception_score_std", "inception_score_std"),
    torch_fidelity.KEY_METRIC_PRECISION: ("precision", "precision"),
    torch_fidelity.KEY_METRIC_RECALL: ("recall", "recall"),
    torch_fidelity.KEY_METRIC_F_SCORE: ("f_score", "f_score"),
}


def calculate(
    images1: torch.Tensor, images2: torch.Tensor, extractor: Extractor, options: EvaluationOptions
) -> tuple[dict[str, float], dict[str, Any]]:
    """Let torch-fidelity score uint8 images1 [N1, C, H, W] against images2 [N2, C, H, W].

    Returns:
        ({our name of a metric: value}, the settings torch-fidelity was given)
    """
    settings = {
        **{name: name in options.metrics for name in METRICS},
        "feature_extractor": extractor.name,
        "kid_subsets": options.kid_subsets,
        "kid_subset_size": options.kid_subset_size,
        "isc_splits": options.isc_splits,
        "prc_neighborhood": options.prc_neighborhood,
        "prc_batch_size": options.prc_batch_size,
        "rng_seed": options.seed,
        "batch_size": options.batch_size,
        "input2_cache_name": cache_name(options, images2),
        "save_cpu_ram": True,  # no worker processes, as the images are in memory; distances of PRC in parts
    }
    if options.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(options.device).index or 0)
    bar = progress_bar(total=len(images1) + len(images2), unit="image", desc="Extracting features")
    with bar, name_batch_size(options):
        values = torch_fidelity.calculate_metrics(
            input1=FidelityImages(images1, bar, before=0),
            input2=FidelityImages(images2, bar, before=len(images1)),
            cuda=options.device.startswith("cuda"),
            cache_root=options.features_cache_dir,
            feature_extractor_weights_path=extractor.weights_path,
            verbose=False,
            **settings,
        )
        bar.update(bar.total - bar.n)  # the reference came from the cache
    column = 0 if extractor.is_standard_inception else 1
    return {ours[column]: values[name] for name, ours in RESULT_NAMES.items() if name in values}, settings


@contextmanager
def name_batch_size(options: EvaluationOptions) -> Iterator[None]:
    """Turn a lack of GPU memory into a ValueError that says which flag to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--batch_size {options.batch_size} needs more memory than {options.device} has") from error


class FidelityImages(torch.utils.data.Dataset):
    """uint8 images [N, 1 or 3, H, W] as torch-fidelity takes them: one by one, RGB. Reading them draws the bar."""

    def __init__(self, images: torch.Tensor, bar: tqdm, before: int):
        self.images, self.bar, self.before = images, bar, before

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.bar.update(max(0, self.before + index + 1 - self.bar.n))
        return self.images[index].expand(3, -1, -1)


def cache_name(options: EvaluationOptions, images: torch.Tensor) -> str:
    """What torch-fidelity calls the reference in its cache. It appends the extractor's name, which holds a hash.

    The pixels say all about data set, split, subset and resizing; device and versions move the last digits."""
    readable = re.sub(r"\W+", "-", f"{Path(options.input2).name}-{options.split2}").strip("-")
    parts = [
        options.input2,
        options.split2,
        fingerprint(images),
        options.device.partition(":")[0],
        scoring_library_versions(),
    ]
    return f"{readable[-60:]}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


def scoring_library_versions() -> dict[str, str]:
    """{library: version} of those whose arithmetic makes the scores."""
    modules = (torch, torchvision, torch_fidelity, transformers, np)
    return {module.__name__: module.__version__ for module in modules}
