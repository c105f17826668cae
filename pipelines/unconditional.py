"""`DDPMPipeline`, with a method that samples images one by one."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from pipelines.sampling import sample_images


class UnconditionalPipeline(DDPMPipeline):
    """A `DDPMPipeline` whose images can be asked for one by one: image i depends on (seed, i) only.

    It loads any folder or Hub id made of a UNet2DModel and a DDPM or DDIM scheduler, and saves a stock
    `DDPMPipeline`.

    Example:
        >>> pipeline = UnconditionalPipeline.from_pretrained("google/ddpm-cifar10-32").to("cuda")
        >>> images = pipeline.sample(range(16), seed=0)  # uint8 [16, 3, 32, 32]
        >>> make_grid_image(images).save("grid.png")
    """

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler | DDIMScheduler):
        super().__init__(unet=unet, scheduler=scheduler)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as a stock `DDPMPipeline`, which anyone with diffusers can load."""
        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_pretrained(save_directory, **kwargs)

    def sample(self, indices: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `sample_images`."""
        return sample_images(self, indices, *args, **kwargs)
