"""The diffusers pipelines that training saves and previews with, and that generation loads."""

from pipelines.kernels import choose_kernels
from pipelines.unconditional import (
    UnconditionalPipeline,
    denoising_steps,
    load_configs,
    make_grid_image,
    to_pil,
)

__all__ = [
    "UnconditionalPipeline",
    "choose_kernels",
    "denoising_steps",
    "load_configs",
    "make_grid_image",
    "to_pil",
]
