"""Tensors of images -> pictures to look at."""

import math

import torch
from PIL import Image
from torchvision.utils import make_grid


def make_grid_image(images: torch.Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """One picture of many: uint8 [N, C, H, W], grey or RGB, row by row, two black pixels apart.

    Args:
        columns: images a row; about a square when None.
        scale: enlarges each pixel to a square of this side; by default small images become at least 64 pixels
            wide.

    Raises:
        ValueError: no image, or neither 1 nor 3 channels.
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"expected uint8 [N, 1 or 3, H, W] with N > 0, got {found}")
    scale = scale or math.ceil(64 / min(64, *images.shape[2:]))
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(images, nrow=columns or math.ceil(math.sqrt(len(images))))
    return to_pil(grid[: images.shape[1]])  # make_grid turns grey into RGB


def to_pil(image: torch.Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W] -> a grey or RGB picture."""
    array = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
