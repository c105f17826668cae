"""A name -> a data set of images: their mode, size and range, decided once for all by a look at a sample."""

from typing import Any

from .dataset import ImageDataset, bad_images_error
from .decoding import BadImage, load_image
from .look import Look
from .sources import Source, open_source

IMAGE_MODES = ("auto", "L", "RGB")
ON_BAD_IMAGE = ("error", "skip")


def open_images(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | None = None,
    image_mode: str = "auto",
    on_bad_image: str = "error",
    white_level: float | None = None,
    like: ImageDataset | None = None,
) -> ImageDataset:
    """Open a source of images as a map-style dataset of square uint8 tensors.

    What is unusual about the source is logged as a warning, and kept in `contents()["notes"]`.

    Args:
        dataset_name: "digits" (scikit-learn's, 8x8 grey, no download); or a local path, to a folder of
            images, of parquet files, or written by `save_to_disk` or generate.py, or to one .parquet or .npz
            file; or a Hub dataset.
        dataset_config_name: configuration of a Hub dataset that has several.
        split: which split; or a slice such as "train[:1000]" or "train[10%:20%]".
        cache_dir: where `datasets` keeps its files; None for its default.
        image_column: name of the image column; None finds it by its type.
        label_column: name of the column of labels; None finds it by its type, ClassLabel, if there is one only.
        resolution: side in pixels; other sizes are resized (bicubic) and centre-cropped. None takes the size
            of the first image, which must be square.
        image_mode: "L" (1 channel), "RGB" (3 channels), or "auto": "L" if a sample of images spread over
            the dataset is all grey.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        white_level: the level that is white in grey images of more than 8 bits or of floats; None for 65535
            if they are integers; if floats, for 1 if a sample of them stays below, else for 255.
        like: another split, whose size, mode and white levels this one has; the three arguments for them are not used.

    Raises:
        ValueError: the source, its split or its image column cannot be found, or the size or mode is unclear.
    """
    _check_arguments(resolution, image_mode, on_bad_image, white_level)
    source = open_source(
        dataset_name,
        config_name=dataset_config_name,
        split=split,
        cache_dir=cache_dir,
        image_column=image_column,
        label_column=label_column,
    )
    look = Look(source.images)
    settings = like.settings if like else _decide(source, look, resolution, image_mode, on_bad_image, white_level)
    dataset = ImageDataset(source, **settings, on_bad_image=on_bad_image)
    for index in look.outside(settings["white_levels"]):
        dataset[index]  # raises an error that names the image: better now than in the middle of a run
    for note in source.notes + look.notes_on_levels(white_level):
        dataset.add_note(note)
    dataset.note_sizes(look.sizes, look.is_complete)
    return dataset


def _check_arguments(resolution: int | None, image_mode: str, on_bad_image: str, white_level: float | None) -> None:
    """Raises ValueError, naming the flag."""
    if image_mode not in IMAGE_MODES:
        raise ValueError(f"--image_mode {image_mode} is none of {IMAGE_MODES}")
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"--on_bad_image {on_bad_image} is none of {ON_BAD_IMAGE}")
    if resolution is not None and resolution < 1:
        raise ValueError(f"--resolution {resolution} is not a positive number of pixels")
    if white_level is not None and not 0 < white_level < float("inf"):
        raise ValueError(f"--white_level {white_level} is not a positive number")


def _decide(
    source: Source,
    look: Look,
    resolution: int | None,
    image_mode: str,
    on_bad_image: str,
    white_level: float | None,
) -> dict[str, Any]:
    """`ImageDataset.settings`, as far as they were not chosen by a look at the images."""
    return {
        "mode": look.common_mode() if image_mode == "auto" else image_mode,
        "mode_is_a_guess": image_mode == "auto",
        "resolution": resolution or _first_resolution(source, on_bad_image),
        "resolution_is_a_guess": resolution is None,
        "white_levels": look.white_levels(white_level),
    }


def _first_resolution(source: Source, on_bad_image: str) -> int:
    """Side in pixels of the first image that can be decoded. Raises ValueError if it is not square."""
    for i, entry in enumerate(source.images):
        try:
            width, height = load_image(entry).size
        except BadImage as error:
            if on_bad_image == "error":
                raise bad_images_error(source.name, {i: error}, len(source.images)) from error
            continue
        if width != height:
            raise ValueError(f"{source.name}: image {i} is {width}x{height}, not square: give --resolution")
        return width
    raise ValueError(f"{source.name}: none of the {len(source.images)} images can be decoded")
