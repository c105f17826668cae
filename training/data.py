"""The images of a run."""

import torch
from accelerate import Accelerator

from images import ImageBatches, ImageDataset, open_images, training_batches

from .options import TrainingOptions
from .resuming import Start, warn_of_changes
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
    warn_of_changes(options, dataset, start)
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
    if options.class_conditional:
        labels_of(options, dataset)  # what is wrong with them is found out here

    def open_split(split: str) -> ImageDataset:
        images = open_images(options.dataset_name, split=split, like=dataset, **reading(options))
        if options.class_conditional and images.classes != dataset.classes:
            raise ValueError("its classes are others than those of the images to train on")
        return images

    return divide(dataset, options.validation_split, open_split)


def reading(options: TrainingOptions) -> dict:
    """How the images of any split are found and read: keyword arguments of `open_images`."""
    names = "dataset_config_name cache_dir image_column label_column on_bad_image"
    return {name: getattr(options, name) for name in names.split()}


def labels_of(options: TrainingOptions, dataset: ImageDataset) -> torch.Tensor:
    """int64 [N] the labels of the images; zeros where the network is not to know them.

    Raises:
        ValueError: there are none, or not of all images.
    """
    if not options.class_conditional:
        return torch.zeros(len(dataset), dtype=torch.long)
    try:
        return dataset.labels()
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
