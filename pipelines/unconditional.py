"""Sampling from an unconditional diffusion model, one random stream per image.

The stock `DDPMPipeline` draws the noise of a whole batch at once, so an image changes with its batch. Here image i
depends on (seed, i) alone.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from pipelines.checks import image_shape
from pipelines.denoising import Step, denoise_step, denoising_steps
from pipelines.noise import image_generators, noise_maps
from pipelines.weights import nonfinite_weights


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

    def sample(
        self,
        indices: Sequence[int],
        seed: int = 0,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        skip_schedule: str = "uniform",
    ) -> torch.Tensor:
        """Images number `indices` of the endless series that `seed` names.

        The noise of image i is the same, bit for bit, in every batch; CPU and CUDA generators differ, so it
        is another image on another kind of device. The network adds up in another order for another batch
        *size*, which moves a pixel by a grey level now and then: where bits matter, keep the size and pad.

        Args:
            indices: numbers of the images, each in [0, 2**32).
            seed: in [0, 2**32).
            num_inference_steps: length of the chain, 1 to `num_train_timesteps`; None for all of them.
            eta: of DDIM eq. 16: 0 is deterministic, 1 is DDPM-like. Must stay 0 for a DDPM scheduler.
            skip_schedule: see `inference_timesteps`.

        Returns:
            uint8 [B, C, H, W] on the pipeline's device.

        Raises:
            ValueError, NotImplementedError: see `denoising_steps` and `image_shape`; or no index, or one out
            of range.
            FloatingPointError: an image is not finite; uint8 would have it black or white.
        """
        device, indices = self._execution_device, [int(i) for i in indices]
        shape = image_shape(self.unet.config)
        steps = denoising_steps(self.scheduler, num_inference_steps, eta, skip_schedule)
        generators = image_generators(seed, indices, device)
        was_training = self.unet.training
        self.unet.eval()
        try:
            x = self._denoise(steps, generators, shape, device)
        finally:
            self.unet.train(was_training)
        self.maybe_free_model_hooks()
        self._check_finite(x, indices)
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    @torch.inference_mode()
    def _denoise(
        self,
        steps: list[Step],
        generators: list[torch.Generator],
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> torch.Tensor:
        """Run the chain from pure noise; float32 [B, C, H, W]. Nothing in the loop waits for the device."""
        x = next(noise_maps(generators, shape, 1, device))
        noise = noise_maps(generators, shape, sum(step.sigma > 0 for step in steps), device)
        clip = self.scheduler.config.clip_sample_range if self.scheduler.config.clip_sample else None
        dtype = self.unet.dtype  # asked once: it walks through all the modules
        timesteps = torch.tensor([step.timestep for step in steps], device=device).unbind()
        for step, t in zip(self.progress_bar(steps), timesteps, strict=True):
            output = self.unet(x.to(dtype), t).sample.float()
            x = denoise_step(step, x, output, next(noise) if step.sigma > 0 else None, clip)
        return x

    def _check_finite(self, x: torch.Tensor, indices: list[int]) -> None:
        """Refuse NaN and infinity; waits for the device, so once a batch and not in the chain."""
        finite = x.isfinite().flatten(1).all(1).tolist()
        if all(finite):
            return
        bad = [index for index, is_finite in zip(indices, finite, strict=True) if not is_finite]
        names = nonfinite_weights(self.unet)
        raise FloatingPointError(
            f"{len(bad)} of {len(indices)} images are not finite (NaN or infinity), the first is number {bad[0]}; "
            + (
                f"neither are the network's weights ({names[0]}, ...)"
                if names
                else "the network's weights are: its arithmetic overflows"
            )
        )
