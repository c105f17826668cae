"""One random stream per image: its noise depends on (seed, index) alone, and not on its batch."""

import math
from collections.abc import Iterator, Sequence

import torch

NOISE_STEPS = 50  # denoising steps whose noise is drawn at once for each image
NOISE_VALUES = 2**20  # at most so many values an image and draw (4 MiB): bounds the memory for large images


def mix32(x: int) -> int:
    """A bijection of the 32-bit integers that scatters neighbours (lowbias32, Wellons 2018)."""
    x = (x + 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def image_seed(seed: int, index: int) -> int:
    """The 64-bit generator seed of image `index`; no two (seed, index) share one.

    PyTorch's CPU generator reads only the low 32 bits: they alone are a bijection of `index` for a fixed
    seed, and of `seed` for a fixed index, so no two images of one run ever start from the same noise.

    Raises:
        ValueError: seed or index outside [0, 2**32).
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}={value} must be in [0, 2**32)")
    return seed << 32 | mix32(mix32(index) ^ seed)


def image_generators(seed: int, indices: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """One generator an image, on the device that draws."""
    if not indices:
        raise ValueError("no image asked for: indices is empty")
    return [torch.Generator(device).manual_seed(image_seed(seed, i)) for i in indices]


def noise_maps(
    generators: list[torch.Generator], shape: tuple[int, ...], count: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """`count` standard normal maps float32 [B, C, H, W], row i from generator i.

    Each is drawn for many steps at once: one launch an image and step would cost as much as the network. How
    many depends on `shape` and `count`, never on the batch. A map is valid until the next one is asked for.
    """
    steps = max(1, min(NOISE_STEPS, NOISE_VALUES // math.prod(shape)))
    for done in range(0, count, steps):
        maps = torch.empty(len(generators), min(steps, count - done), *shape, device=device)
        for row, generator in zip(maps, generators, strict=True):
            row.normal_(generator=generator)
        yield from maps.unbind(1)
