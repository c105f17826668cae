"""The images of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from images import ImageBatches, ImageDataset, ImageError, open_images, training_batches

from .options import TrainingOptions, validation_share
from .output import OutputDir
from .resuming import Start, warn_of_changes
from .state import TrainingState


def read_data(
    options: TrainingOptions, accelerator: Accelerator, start: Start
) -> tuple[ImageDataset, ImageDataset | None]:
    """As `open_training_data`, on each process; says what it is, and what has changed since the checkpoint."""
    with accelerator.local_main_process_first():
        dataset, validation_images = open_training_data(options)
    options.resolution = dataset.resolution  # for the record, and whoever repeats the run
    accelerator.print(dataset.describe())
    if validation_images:
        accelerator.print(f"validation: {validation_images.describe()}")
    warn_of_changes(options, dataset, start)
    return dataset, validation_images


def open_training_data(options: TrainingOptions) -> tuple[ImageDataset, ImageDataset | None]:
    """(What to train on, what to measure the validation loss on, or None).

    Raises:
        ValueError: it cannot be found or used; naming the flag.
    """
    dataset = open_images(options.dataset_name, resolution=options.resolution, **reading(options))
    if options.validation_split is None:
        return dataset, None
    share = validation_share(options.validation_split)
    if share is not None:
        if len(dataset) < 2:
            raise ValueError(f"--validation_split {options.validation_split}: there is but one image")
        return dataset.hold_out(share)
    settings = reading(options) | {"image_mode": "L" if dataset.channels == 1 else "RGB"}
    try:
        split = options.validation_split
        validation = open_images(options.dataset_name, split=split, resolution=dataset.resolution, **settings)
    except ValueError as error:
        raise ValueError(f"--validation_split {split}: {error}") from error
    return dataset, validation


def reading(options: TrainingOptions) -> dict:
    """How images are found and read: keyword arguments of `open_images`."""
    names = ("dataset_config_name", "cache_dir", "image_column", "image_mode", "on_bad_image", "white_level")
    return {name: getattr(options, name) for name in names}


def open_batches(
    options: TrainingOptions, dataset: ImageDataset, accelerator: Accelerator, images_seen: int
) -> ImageBatches:
    """Endless uint8 [B, C, H, W] of an update each, from image number `images_seen` of the run on: all processes
    together see what one would with the whole batch."""
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
    )


@contextmanager
def checkpoint_if_data_fails(state: TrainingState, output: OutputDir, total_limit: int | None) -> Iterator[None]:
    """Save the state where images that were there when the run began cannot be read any more.

    Of several processes none does: the others wait for this one in the next update."""
    try:
        yield
    except (ImageError, OSError):
        if state.accelerator.num_processes == 1:
            state.save(output, total_limit)
        raise
