"""The images of a run."""

import zlib
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from images import ImageBatches, ImageDataset, LatentDataset, open_images, training_batches

from .options import ClassOptions, TrainingOptions
from .resuming import Start, check_same_classes, warn_of_changes
from .vae import identify_vae
from .validation import divide


def read_data(
    options: TrainingOptions, accelerator: Accelerator, start: Start
) -> tuple[ImageDataset, ImageDataset | None]:
    """As `open_training_data`, on each process; says what it is, and what has changed since the checkpoint."""
    with accelerator.local_main_process_first():
        dataset, validation_images = open_training_data(options)
    options.resolution = dataset.resolution  # for the record, and whoever repeats the run
    accelerator.print(dataset.describe())
    if validation_images is not None:
        accelerator.print(f"validation: {validation_images.describe()}")
    identity = identify(options, dataset)
    check_same_classes(options, identity, start)
    warn_of_changes(options, dataset.name, identity, start)
    return dataset, validation_images


def open_training_data(options: TrainingOptions) -> tuple[ImageDataset, ImageDataset | None]:
    """(What to train on, what to measure the validation loss on or None); see `divide`.

    Raises:
        ValueError: it cannot be found or used; naming the flag.
    """
    dataset = open_images(
        options.dataset_name,
        resolution=options.resolution,
        image_mode=options.image_mode,
        white_level=options.white_level,
        **reading(options),
    )
    labels_of(options, dataset)  # what is wrong with them is found out here

    def open_split(split: str) -> ImageDataset:
        images = open_images(options.dataset_name, split=split, like=dataset, **reading(options))
        labels_of(options, images, dataset.classes)
        return images

    dataset, validation_images = divide(dataset, options.validation_split, open_split)
    check_classes(options, dataset)
    return dataset, validation_images


def check_classes(options: ClassOptions, dataset: ImageDataset) -> None:
    """Refuse a class that there is nothing to train on. Raises ValueError."""
    if options.class_conditional:
        counts = torch.bincount(dataset.labels(), minlength=len(dataset.classes))
        if not counts.all():
            name = dataset.classes[int((counts == 0).nonzero()[0])]
            raise ValueError(f"--class_conditional: there is no image of class {name!r} to train on")


def identify(
    options: ClassOptions, dataset: ImageDataset | LatentDataset, vae: AutoencoderKL | None = None
) -> dict[str, Any]:
    """What tells the images of a run from others; of their labels, if the network knows them; and the VAE, if it is
    trained in latents."""
    vae_identity = None if vae is None else identify_vae(vae)
    identity = {"images": len(dataset), "fingerprint": dataset.pixels.fingerprint(), "vae": vae_identity}
    if options.class_conditional:
        labels = dataset.labels().numpy().tobytes()
        identity |= {"classes": dataset.classes, "labels": f"{zlib.crc32(labels):08x}"}
    return identity


def reading(options: TrainingOptions) -> dict:
    """How the images of any split are found and read: keyword arguments of `open_images`."""
    names = "dataset_config_name cache_dir image_column label_column on_bad_image"
    return {name: getattr(options, name) for name in names.split()}


def labels_of(options: ClassOptions, dataset: ImageDataset, classes: list[str] | None = None) -> torch.Tensor:
    """int64 [N] the labels of the images, as indices into `classes`; zeros where the network is not to know them.

    Raises:
        ValueError: there are none, or not of all images.
    """
    if not options.class_conditional:
        return torch.zeros(len(dataset), dtype=torch.long)
    try:
        return dataset.labels(classes)
    except ValueError as error:
        raise ValueError(f"--class_conditional: {error}") from error


def open_batches(
    options: TrainingOptions, dataset: ImageDataset, accelerator: Accelerator, images_seen: int
) -> ImageBatches:
    """Endless (uint8 [B, C, H, W], labels [B]) of an update each, from image number `images_seen` of the run on: all
    processes together see what one would with the whole batch."""
    return training_batches(
        dataset,
        options.images_per_process,
        seed=options.seed,
        first_image=images_seen,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        placement=options.data_placement,
        num_workers=options.dataloader_num_workers,
        show_progress=accelerator.is_local_main_process,
        labels=labels_of(options, dataset),
    )
