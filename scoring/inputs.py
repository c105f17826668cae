"""--input1, the generated images, and --input2, the reference: opened, checked, read and described."""

import hashlib
import re
from itertools import islice
from typing import Any

import numpy as np
import torch

from images import ImageDataset, open_images
from progress import progress_bar
from scoring.options import EvaluationOptions


def open_input(options: EvaluationOptions, number: int) -> ImageDataset:
    """Open --input1 or --input2 as an `ImageDataset`.

    Raises:
        ValueError: it cannot be found or read; the message names the flag.
    """
    try:
        return open_images(
            getattr(options, f"input{number}"),
            dataset_config_name=getattr(options, f"dataset_config_name{number}"),
            split=getattr(options, f"split{number}"),
            cache_dir=options.cache_dir,
            image_column=getattr(options, f"image_column{number}"),
            resolution=options.resolution,
            image_mode=options.image_mode,
            on_bad_image=options.on_bad_image,
            white_level=getattr(options, f"white_level{number}"),
        )
    except ValueError as error:
        raise ValueError(name_input(str(error), number)) from error


def name_input(message: str, number: int) -> str:
    """Say --input1 where `images` says --dataset_name, as training calls it."""
    message = re.sub(r"--(dataset_config_name|image_column|white_level)\b", rf"--\g<1>{number}", message)
    message = message.replace("--dataset_name", f"--input{number}")
    return message if f"--input{number}" in message else f"--input{number}: {message}"


def read_input(options: EvaluationOptions, number: int, images: ImageDataset) -> torch.Tensor:
    """Decode an input, or the subset that was asked for: uint8 [N, C, H, W]. ValueError names the flag."""
    try:
        return read_images(images, getattr(options, f"num_images{number}"), options.seed)
    except ValueError as error:
        raise ValueError(name_input(str(error), number)) from error


def read_images(images: ImageDataset, num_images: int | None = None, seed: int = 0) -> torch.Tensor:
    """Decode all the images, or a random subset of `num_images`: uint8 [N, C, H, W]."""
    if num_images is None:
        return images.decode_all()
    order = np.random.RandomState(seed).permutation(len(images)).tolist()
    readable = (image for image, bad in map(images.image_or_next, order) if not bad)
    subset = progress_bar(islice(readable, num_images), total=num_images, desc=f"Decoding {images.name}", unit="image")
    return torch.stack(list(subset))


def wanted_count(options: EvaluationOptions, number: int, images: ImageDataset) -> int:
    """How many images of an input to use. Raises ValueError if it has fewer."""
    wanted = getattr(options, f"num_images{number}")
    if wanted is not None and wanted > len(images):
        raise ValueError(f"--num_images{number} {wanted}: --input{number} has {len(images)} images only")
    return wanted or len(images)


def fingerprint(images: torch.Tensor) -> str:
    """SHA-256 of the pixels and the shape of uint8 images [N, C, H, W]."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy())
    return digest.hexdigest()


def describe_input(
    options: EvaluationOptions, number: int, source: ImageDataset, images: torch.Tensor
) -> dict[str, Any]:
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
