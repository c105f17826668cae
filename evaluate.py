"""Two sources of images in, metrics.json out: FID, KID, Inception Score, precision and recall.

python evaluate.py --input1 samples --input2 uoft-cs/cifar10 --output_dir scores
python evaluate.py --input1 samples --input2 uoft-cs/cifar10 --output_dir scores-dinov2 \\
    --feature_extractor facebook/dinov2-large

The numbers are torch-fidelity's, with its Inception weights and its settings: they can be compared with published
ones of the same data set, number of images and metric. With any other feature extractor or weights the Fréchet and
kernel distances are called FD and KD: never compare them with an FID or a KID. Precision and recall (Kynkäänniemi et
al. 2019) look at the same features as the other metrics, as in ADM's evaluator; the paper's own are of VGG-16.

--input1 is the generated set, --input2 the reference; its features are cached under a hash of its pixels, so
that they are extracted once, and anew when anything about it or the extractor has changed.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch_fidelity
import torchvision
import transformers
from transformers.hf_argparser import HfArg

from feature_extractors import INCEPTION, INCEPTION_SHA256, load_extractor
from images import open_images
from progress import progress_bar
from recipes import one_line_errors, parse_options
from training.folder_lock import folder_lock
from training.saving import read_json, write_json

METRICS = ("fid", "kid", "isc", "prc")
NAMES = {  # torch-fidelity's: (ours with its Inception weights, ours with any others)
    torch_fidelity.KEY_METRIC_FID: ("fid", "fd"),
    torch_fidelity.KEY_METRIC_KID_MEAN: ("kid", "kd"),
    torch_fidelity.KEY_METRIC_KID_STD: ("kid_std", "kd_std"),
    torch_fidelity.KEY_METRIC_ISC_MEAN: ("inception_score", "inception_score"),
    torch_fidelity.KEY_METRIC_ISC_STD: ("inception_score_std", "inception_score_std"),
    torch_fidelity.KEY_METRIC_PRECISION: ("precision", "precision"),
    torch_fidelity.KEY_METRIC_RECALL: ("recall", "recall"),
    torch_fidelity.KEY_METRIC_F_SCORE: ("f_score", "f_score"),
}
RESULT = "metrics.json"
FEW_IMAGES = 10_000


@dataclass
class EvaluationOptions:
    """Images are named as for training; 1 is the generated set and 2 the reference."""

    config: str | None = HfArg(default=None, help="A recipe (YAML) of these options; flags override it.")
    input1: str | None = HfArg(default=None, help="Generated images: generate.py's or any folder, an .npz, a data set.")
    input2: str | None = HfArg(default=None, help="Reference images, likewise; a Hub name, or 'digits'.")
    output_dir: str | None = HfArg(default=None, help=f"Where {RESULT} goes.")
    overwrite_output_dir: bool = HfArg(default=False, help=f"Replace the {RESULT} in --output_dir.")
    metrics: list[str] | None = field(
        default=None, metadata={"help": f"Of {' '.join(METRICS)}; default: all that apply to the feature extractor."}
    )

    # Images
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
    dataset_cache_dir: str | None = HfArg(default=None, help="Where downloaded data sets are kept.")

    # Features
    feature_extractor: str = HfArg(default=INCEPTION, help="Or a `transformers` vision model: Hub name or folder.")
    feature_extractor_weights: str | None = HfArg(default=None, help="Inception's; default: downloaded once.")
    batch_size: int = HfArg(default=64, help="Images per forward pass.")
    device: str | None = HfArg(default=None, help="cpu, cuda or cuda:N; default: cuda if there is one.")
    cache_dir: str | None = HfArg(default=None, help="Of reference features; default: torch-fidelity's.")

    # Metrics; the defaults are torch-fidelity's
    seed: int = HfArg(default=2020, help="Of random subsets, and of the subsets of KID and the splits of ISC.")
    kid_subsets: int = HfArg(default=100, help="KID is the mean over so many subsets ...")
    kid_subset_size: int = HfArg(default=1000, help="... of so many images.")
    isc_splits: int = HfArg(default=10, help="Parts whose Inception Scores are averaged.")
    prc_neighborhood: int = HfArg(default=3, help="k: a ball reaches to the k-th nearest neighbour.")
    prc_batch_size: int = HfArg(default=10_000, help="Rows and columns of the distance matrix at a time.")
    allow_few_images: bool = HfArg(default=False, help="A Fréchet distance from fewer images than features.")

    def __post_init__(self):
        for name in ("input1", "input2", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is required (--help lists the flags)")
        positive = """num_images1 num_images2 resolution batch_size kid_subsets kid_subset_size isc_splits
            prc_neighborhood prc_batch_size"""
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: must be in [0, 2**32)")
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


def check_device(name):
    """The name of the device to compute on. Raises ValueError if there is no such device."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    number = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if number is None:
        raise ValueError(f"--device {name}: must be cpu, cuda or cuda:N")
    if name != "cpu" and int(number[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return name


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(EvaluationOptions, argv)
    with one_line_errors(ValueError, OSError), folder_lock(options.output_dir):
        evaluate(options, argv)


def evaluate(options, argv):
    """Score the two inputs, and write the result into a folder that this process holds."""
    start = time.perf_counter()
    # Refuse what cannot work before anything takes long
    result_path = check_result(options)
    inputs = [open_input(options, 1), open_input(options, 2)]
    print_inputs(inputs)
    check_sizes(options, *inputs)
    counts = [wanted_count(options, number, images) for number, images in enumerate(inputs, 1)]
    check_counts(options, *counts)
    extractor = load_extractor(options.feature_extractor, options.feature_extractor_weights)
    check_rank(options, extractor, *counts)
    make_folders(options)

    images1 = read_input(options, 1, inputs[0])
    images2 = read_input(options, 2, inputs[1])
    check_counts(options, len(images1), len(images2))  # once more: unreadable ones may have been skipped
    check_rank(options, extractor, len(images1), len(images2))
    read_seconds = time.perf_counter() - start

    values, settings = calculate(images1, images2, extractor, options)

    seconds = {"read": read_seconds, "total": time.perf_counter() - start}
    record = {
        "values": values,
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "options": asdict(options),
        "input1": describe_input(options, 1, inputs[0], images1),
        "input2": describe_input(options, 2, inputs[1], images2),
        "feature_extractor": extractor.description,
        "torch_fidelity": settings,
        **describe_machine(options.device),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(record, result_path)
    print_table(record)
    print(f"{result_path} says how to repeat this")


def calculate(images1, images2, extractor, options):
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
            cache_root=options.cache_dir,
            feature_extractor_weights_path=extractor.weights_path,
            verbose=False,
            **settings,
        )
        bar.update(bar.total - bar.n)  # the reference came from the cache
    column = 0 if extractor.is_standard_inception else 1
    return {ours[column]: values[name] for name, ours in NAMES.items() if name in values}, settings


@contextmanager
def name_batch_size(options):
    """Turn a lack of GPU memory into a ValueError that says which flag to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--batch_size {options.batch_size} needs more memory than {options.device} has") from error


class FidelityImages(torch.utils.data.Dataset):
    """uint8 images [N, 1 or 3, H, W] as torch-fidelity takes them: one by one, RGB. Reading them draws the bar."""

    def __init__(self, images, bar, before):
        self.images, self.bar, self.before = images, bar, before

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.bar.update(max(0, self.before + index + 1 - self.bar.n))
        return self.images[index].expand(3, -1, -1)


# ----------------------------------------------------------------------------------------------------- images


def open_input(options, number):
    """Open --input1 or --input2 as an `ImageDataset`.

    Raises:
        ValueError: it cannot be found or read; the message names the flag.
    """
    try:
        return open_images(
            getattr(options, f"input{number}"),
            dataset_config_name=getattr(options, f"dataset_config_name{number}"),
            split=getattr(options, f"split{number}"),
            cache_dir=options.dataset_cache_dir,
            image_column=getattr(options, f"image_column{number}"),
            resolution=options.resolution,
            image_mode=options.image_mode,
            on_bad_image=options.on_bad_image,
            white_level=getattr(options, f"white_level{number}"),
        )
    except ValueError as error:
        raise ValueError(name_input(str(error), number)) from error


def name_input(message, number):
    """Say --input1 where `images` says --dataset_name, as training calls it."""
    message = re.sub(r"--(dataset_config_name|image_column|white_level)\b", rf"--\g<1>{number}", message)
    message = message.replace("--dataset_name", f"--input{number}")
    return message if f"--input{number}" in message else f"--input{number}: {message}"


def read_input(options, number, images):
    """Decode an input, or the subset that was asked for. Raises ValueError, which names the flag."""
    try:
        return read_images(images, getattr(options, f"num_images{number}"), options.seed)
    except ValueError as error:
        raise ValueError(name_input(str(error), number)) from error


def read_images(images, num_images=None, seed=0):
    """Decode all the images, or a random subset of `num_images`: uint8 [N, C, H, W]."""
    if num_images is None:
        return images.decode_all()
    order = np.random.RandomState(seed).permutation(len(images)).tolist()
    readable = (image for image, bad in map(images.image_or_next, order) if not bad)
    subset = progress_bar(islice(readable, num_images), total=num_images, desc=f"Decoding {images.name}", unit="image")
    return torch.stack(list(subset))


# ----------------------------------------------------------------------------------------------------- checks


def check_result(options):
    """The path of the result to come. Raises ValueError if there is one already."""
    path = Path(options.output_dir) / RESULT
    if path.exists() and not options.overwrite_output_dir:
        raise ValueError(f"--output_dir {options.output_dir} has a {RESULT}: --overwrite_output_dir replaces it")
    if path.exists() and not {"values", "torch_fidelity"} <= read_json(path).keys():
        raise ValueError(f"--overwrite_output_dir: {path} is not one of evaluate.py's; choose another folder")
    for flag in ("output_dir", "cache_dir"):
        folder = getattr(options, flag)
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"--{flag} {folder} is a file, not a folder")
    return path


def make_folders(options):
    """Make --output_dir and --cache_dir. Raises ValueError or OSError if nothing can be written there."""
    for flag in ("output_dir", "cache_dir"):
        folder = getattr(options, flag)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise ValueError(f"--{flag} {folder}: no permission to write there")


def check_sizes(options, images1, images2):
    """Raise ValueError unless both inputs have images of one size."""
    size1, size2 = images1.resolution, images2.resolution
    if size1 != size2:
        raise ValueError(
            f"--input1 {options.input1} has images of {size1}x{size1} and --input2 {options.input2} of "
            f"{size2}x{size2}: --resolution {min(size1, size2)} would resize both"
        )


def wanted_count(options, number, images):
    """How many images of an input to use. Raises ValueError if it has fewer."""
    wanted = getattr(options, f"num_images{number}")
    if wanted is not None and wanted > len(images):
        raise ValueError(f"--num_images{number} {wanted}: --input{number} has {len(images)} images only")
    return wanted or len(images)


def check_counts(options, count1, count2):
    """Raise ValueError if a metric needs more images than there are."""
    for flag, count in (("--input1", count1), ("--input2", count2)):
        if count < 2:
            raise ValueError(f"{flag} gives {count} images: at least 2 are needed")
        if "kid" in options.metrics and options.kid_subset_size > count:
            raise ValueError(
                f"--kid_subset_size {options.kid_subset_size}: {flag} gives {count} images only, and a subset must "
                "not be larger"
            )
        if "prc" in options.metrics and options.prc_neighborhood >= count:
            raise ValueError(
                f"--prc_neighborhood {options.prc_neighborhood}: {flag} gives {count} images only, of which one has "
                f"{count - 1} neighbours"
            )
    if "isc" in options.metrics and options.isc_splits > count1:
        raise ValueError(f"--isc_splits {options.isc_splits}: --input1 gives {count1} images only")


def check_rank(options, extractor, count1, count2):
    """Raise ValueError if the covariance of the features cannot have full rank."""
    for flag, count in (("--input1", count1), ("--input2", count2)):
        if "fid" in options.metrics and count <= extractor.num_features and not options.allow_few_images:
            raise ValueError(
                f"{flag} gives {count} images, but a Fréchet distance of {extractor.num_features} features needs more "
                f"than {extractor.num_features}, else the covariance is singular: --metrics without fid, or "
                "--allow_few_images"
            )


# ----------------------------------------------------------------------------------------------------- results


def fingerprint(images):
    """SHA-256 of the pixels and the shape of uint8 images [N, C, H, W]."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy())
    return digest.hexdigest()


def cache_name(options, images):
    """What torch-fidelity calls the reference in its cache. It appends the extractor's name, which holds a hash.

    The pixels say all about data set, split, subset and resizing; device and versions move the last digits."""
    readable = re.sub(r"\W+", "-", f"{Path(options.input2).name}-{options.split2}").strip("-")
    parts = [options.input2, options.split2, fingerprint(images), options.device.partition(":")[0], versions()]
    return f"{readable[-60:]}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


def describe_input(options, number, source, images):
    """What one input was: `source` as it was opened, and the `images` [N, C, H, W] taken from it."""
    flags = (f"split{number}", f"dataset_config_name{number}", f"image_column{number}", f"white_level{number}")
    return {
        "name": getattr(options, f"input{number}"),
        **{flag[:-1]: getattr(options, flag) for flag in flags},
        "contents": source.contents(),
        "num_images": len(images),
        "shape": list(images.shape[1:]),
        "sha256": fingerprint(images),
    }


def describe_machine(device):
    is_cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"cpu, {platform.machine()}",
        "tf32_convolutions": is_cuda and torch.backends.cudnn.allow_tf32,
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions():
    modules = (torch, torchvision, torch_fidelity, transformers, np)
    return {module.__name__: module.__version__ for module in modules}


def print_inputs(inputs):
    """One line an input: how many images there are, of what, and what was left out."""
    for number, images in enumerate(inputs, 1):
        print(f"--input{number}: {images.describe()}")


def print_table(record):
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


if __name__ == "__main__":
    main()
