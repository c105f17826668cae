"""A small classifier whose features a Fréchet distance can be of, where no weights can be downloaded.

    python benchmarks/feature_extractor.py --dataset_name uoft-cs/cifar10 --output_dir runs/feature_extractor
    python evaluate.py --feature_extractor runs/feature_extractor ...
    python compare.py --eval_feature_extractor runs/feature_extractor ...

Trains a RegNet (Radosavovic et al. 2020, Designing Network Design Spaces), in less than an hour on a CPU core at 32x32,
and measures how many images that it has not seen it tells right, and what the Fréchet distance of its features
makes of noise and blur. The folder is read as any vision model of `transformers` is.

On one kind of CPU, with one number of threads and the same versions, the same options give the same weights. Another
rounds differently and gives another network, with other distances: they are comparable where `weights_sha256`, printed
and recorded, is the same. Such a distance is called FD, and is never to be compared with an FID.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import gaussian_blur
from transformers import RegNetConfig, RegNetForImageClassification, ViTImageProcessor
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_folder, check_new_record

from images import ImageDataset, normalize, open_images, training_batches
from pipelines.files import named_save_errors
from progress import progress_bar
from recipes import check_ranges, one_line_errors, parse_options
from scoring.feature_extractors import load_extractor
from scoring.fidelity import scoring_library_versions
from scoring.frechet_metric import make_frechet_metric
from training.machine import device_name, this_command
from training.saving import write_json
from training.validation import divide

# The network: 32x32 pixels to 16x16 at once, then stages of 16x16, 8x8 and 4x4
EMBEDDING_SIZE = 32
HIDDEN_SIZES = [64, 128, 320]  # the last is the number of features, fewer than the images of any score
DEPTHS = [1, 2, 2]
GROUPS_WIDTH = 64

WARM_UP = 0.2  # share of the updates in which the learning rate rises
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 5e-4, 0.1
MAX_SHIFT = 3 / 32  # of the side
CHECKED_EVERY = 20  # updates
BATCH_SIZE = 250  # where no gradients are needed
READ = 10_000  # images on each side of a distance, where there are as many
NOISES = (2, 5, 10, 20)  # standard deviations, in grey levels
BLUR = 0.7  # standard deviation, in pixels
PRECISIONS = ("no", "bf16")
RANGES = {
    "resolution": "[2, 2**16]",
    "num_epochs": "[1, 2**20]",
    "train_batch_size": "[2, 2**16]",
    "learning_rate": "(0, inf)",
    "seed": "[0, 2**32)",
}


@dataclass
class ExtractorOptions:
    """Options of benchmarks/feature_extractor.py."""

    output_dir: str = HfArg(default="feature_extractor", help="Where the model goes: a folder that is new or empty.")
    output_json: str | None = HfArg(default=None, help="New file of the measurements.")
    dataset_name: str = HfArg(default="uoft-cs/cifar10", help="As in training; with labels.")
    label_column: str | None = HfArg(default=None, help="As in training.")
    validation_split: str = HfArg(default="test", help="What to measure on: a split, or the share to hold out (0.05).")
    resolution: int | None = HfArg(default=None, help="As in training.")
    num_epochs: int = HfArg(default=14, help="Passes over the data; the learning rate falls to 0 until the end.")
    train_batch_size: int = HfArg(default=128, help="Images of an update.")
    learning_rate: float = HfArg(default=0.1, help="The highest, of SGD with Nesterov's momentum.")
    mixed_precision: str = HfArg(default="no", help="no, or bf16: faster on a CPU or GPU that has the instructions.")
    seed: int = HfArg(default=0, help="Of initial weights, data order, flips and shifts.")

    def __post_init__(self):
        check_ranges(self, RANGES)
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"--mixed_precision {self.mixed_precision}: must be one of {', '.join(PRECISIONS)}")


def main(options: ExtractorOptions) -> None:
    with one_line_errors(ValueError, OSError, FloatingPointError):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_new_folder(options.output_dir, options.dataset_name)
        check_new_record(options.output_json)
        dataset, labels, test_images, test_labels = open_data(options)
        os.makedirs(options.output_dir, exist_ok=True)

        torch.manual_seed(options.seed)
        classifier = build_classifier(dataset.classes).to(device, memory_format=torch.channels_last)
        batches = training_batches(dataset, options.train_batch_size, seed=options.seed, device=device, labels=labels)
        updates = math.ceil(options.num_epochs * len(dataset) / options.train_batch_size)
        seconds = train(classifier, batches, updates, options.learning_rate, options.mixed_precision)
        with named_save_errors(Path(options.output_dir)):
            classifier.base_model.save_pretrained(options.output_dir)
            preprocessing(dataset.resolution).save_pretrained(options.output_dir)

        extractor = load_extractor(options.output_dir)
        measured = {
            "weights_sha256": extractor.description["weights_sha256"],
            "features": extractor.num_features,
            "parameters": sum(parameter.numel() for parameter in classifier.base_model.parameters()),
            "seconds": seconds,
            "test_accuracy": accuracy(classifier.eval(), test_images.decode_all(), test_labels),
            "frechet_distances": frechet_distances(options.output_dir, dataset, test_images, device),
        }
        print(*(f"{name}: {value}" for name, value in measured.items()), sep="\n")
        settings = {
            "options": asdict(options),
            "device": device_name(device),
            "versions": scoring_library_versions(),
            "command": this_command(),
        }
        if options.output_json:
            write_json(measured | settings, Path(options.output_json))


def open_data(options: ExtractorOptions) -> tuple[ImageDataset, torch.Tensor, ImageDataset, torch.Tensor]:
    """(Images to train on, their labels [N], images to measure on, theirs [M]). Raises ValueError, naming the flag."""
    open_split = partial(open_images, options.dataset_name, label_column=options.label_column)
    dataset = open_split(resolution=options.resolution)
    dataset.labels()  # raises where there are none, before another split is sought
    dataset, test_images = divide(
        dataset, options.validation_split, lambda split: open_split(split=split, like=dataset)
    )
    check_counts(options, len(dataset), len(test_images))
    print(dataset.describe())
    return dataset, dataset.labels(), test_images, test_images.labels(dataset.classes)


def check_counts(options: ExtractorOptions, num_images: int, num_test_images: int) -> None:
    """Raise ValueError, naming the flag, unless every distance is of more images than there are features."""
    least = HIDDEN_SIZES[-1] + 1
    for given, count, needed in (
        (f"--dataset_name {options.dataset_name}", num_images, 2 * least),
        (f"--validation_split {options.validation_split}", num_test_images, least),
    ):
        if count < needed:
            raise ValueError(f"{given}: gives {count} images, and distances of {least - 1} features need {needed}")


# Training


def build_classifier(classes: list[str]) -> RegNetForImageClassification:
    """[N, 3, H, W] to logits [N, len(classes)], by HIDDEN_SIZES[-1] features; random weights."""
    config = RegNetConfig(
        embedding_size=EMBEDDING_SIZE,
        hidden_sizes=HIDDEN_SIZES,
        depths=DEPTHS,
        groups_width=GROUPS_WIDTH,
        layer_type="x",
        downsample_in_first_stage=False,
        num_labels=len(classes),
    )
    return RegNetForImageClassification(config)


def preprocessing(resolution: int) -> ViTImageProcessor:
    """`normalize`, of images of any size, as `transformers` saves it."""
    side = {"height": resolution, "width": resolution}
    return ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def train(
    classifier: RegNetForImageClassification,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    updates: int,
    max_learning_rate: float,
    mixed_precision: str,
) -> float:
    """Train by so many updates, the learning rate rising linearly, then falling to 0: seconds.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=max_learning_rate, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    start = time.perf_counter()
    with progress_bar(total=updates, unit="update", desc="Training") as bar:
        for update in range(updates):
            spent = (update + 0.5) / updates
            for group in optimizer.param_groups:
                group["lr"] = max_learning_rate * min(spent / WARM_UP, (1 - spent) / (1 - WARM_UP))
            images, labels = next(batches)
            # A context for each update, as it keeps the weights that it has rounded until its end
            with torch.autocast(images.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
                logits = classifier(augment(images)).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (update + 1) % CHECKED_EVERY == 0 or update + 1 == updates:  # reading the loss waits for a GPU
                bar.set_postfix(loss=checked(loss, update + 1), refresh=False)
                bar.update(update + 1 - bar.n)
    return time.perf_counter() - start


def checked(loss: torch.Tensor, updates: int) -> float:
    """The loss as a number. Raises FloatingPointError where it is none."""
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()} after {updates} updates: try a lower --learning_rate")
    return loss.item()


def augment(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1 or 3, H, W] to RGB, float32 [N, 3, H, W] in [-1, 1]: each image mirrored or not, and shifted by up to
    MAX_SHIFT of its side both ways, the border filled with its reflection."""
    count, _, side, _ = images.shape
    draw = partial(torch.randint, device=images.device)
    images = normalize(images, flips=draw(2, (count,)).bool()).expand(-1, 3, -1, -1)
    margin = round(MAX_SHIFT * side)
    padded = torch.nn.functional.pad(images, [margin] * 4, mode="reflect")
    pixels = torch.arange(side, device=images.device)
    rows, columns = (draw(2 * margin + 1, (count, 1)) + pixels for _ in range(2))
    numbers = torch.arange(count, device=images.device)
    shifted = padded[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, 3]
    return shifted.permute(0, 3, 1, 2)  # in memory still as it was: channels last, which is faster


# Measurements


@torch.no_grad()
def accuracy(classifier: RegNetForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of uint8 images [N, 1 or 3, H, W] whose label [N] is the likeliest."""
    batches = zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    right = (
        classifier(normalize(batch.to(classifier.device)).expand(-1, 3, -1, -1)).logits.argmax(1).cpu() == label
        for batch, label in batches
    )
    return torch.cat(list(right)).double().mean().item()


def frechet_distances(
    folder: str, dataset: ImageDataset, test_images: ImageDataset, device: torch.device
) -> dict[str, Any]:
    """From one half of the training images (READ of them, where there are more): of the other half, of test images, and
    of test images with Gaussian noise, by its standard deviation in grey levels, or blurred."""
    metric = make_frechet_metric(folder, device=device)
    images, _ = dataset.random_sample(2 * READ)
    half, other_half = images.split(math.ceil(len(images) / 2))
    test_sample, _ = test_images.random_sample(READ)
    generator = torch.Generator(device).manual_seed(0)
    for batch in half.split(BATCH_SIZE):
        metric.update(batch.to(device), real=True)

    def distance(others: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> float:
        metric.reset()  # the generated ones alone
        for batch in others.split(BATCH_SIZE):
            metric.update(change(batch.to(device)), real=False)
        return metric.compute().item()

    return {
        "images": [len(half), len(other_half), len(test_sample)],
        "other_training_images": distance(other_half),
        "test_images": distance(test_sample),
        **{f"noise_{std}": distance(test_sample, partial(add_noise, std=std, generator=generator)) for std in NOISES},
        "blur": distance(test_sample, partial(gaussian_blur, kernel_size=5, sigma=BLUR)),
    }


def add_noise(images: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """uint8 images with Gaussian noise of this standard deviation, in grey levels."""
    noise = std * torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    main(parse_options(ExtractorOptions))
