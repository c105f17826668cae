"""What a network and its scheduler must be like to sample from them; each refusal names the setting."""

import math
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

SIGMA_LEARNED = ("learned", "learned_range")
SPACINGS = ("linspace", "leading", "trailing")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def image_shape(unet_config: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images that a U-Net with this config makes.

    Raises:
        ValueError: it takes conditions other than class labels, has a learned variance, or does not name its size.
    """
    channels, size = unet_config.get("in_channels", 3), unet_config.get("sample_size")
    if embedding := unet_config.get("class_embed_type"):
        raise ValueError(f"the UNet2DModel has class_embed_type={embedding!r}; only plain class labels are known here")
    if (outputs := unet_config.get("out_channels", 3)) != channels:
        raise ValueError(f"the UNet2DModel has in_channels={channels} but out_channels={outputs}")
    if size is None:
        raise ValueError("the UNet2DModel's config has no sample_size, so the images' size is not known")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    for value in (channels, height, width):
        if type(value) is not int or value < 1:
            raise ValueError(
                f"the UNet2DModel has in_channels={channels!r}, sample_size={size!r}: not whole numbers > 0"
            )
    return channels, height, width


def check_forward(unet: UNet2DModel, shape: tuple[int, int, int]) -> None:
    """Call a network of shapes alone, made on the meta device: images [C, H, W] must come out as they went in.

    Raises:
        ValueError: they come out in another shape.
        Exception: whatever a setting leads to that only shows when the network is called.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        images, timesteps = torch.empty(2, *shape), torch.zeros(2, dtype=torch.long)
        class_labels = timesteps if unet.config.num_class_embeds else None
        output = unet(images, timesteps, class_labels, return_dict=False)[0]
    if output.shape != images.shape:
        raise ValueError(f"images of {list(shape)} come out as {list(output.shape[1:])}")


def check_alphas_cumprod(scheduler: DDPMScheduler | DDIMScheduler) -> None:
    """Refuse a table ᾱ_t [T] of another length than T, or that leaves [0, 1]."""
    table, trained = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    if len(table) != trained:
        raise ValueError(f"trained_betas has {len(table)} values, and num_train_timesteps is {trained}")
    if not ((table >= 0) & (table <= 1)).all():  # nor is NaN
        raise ValueError("its betas (beta_start, beta_end, trained_betas) give an alphas_cumprod outside [0, 1]")


def check_scheduler(scheduler: Any, eta: float = 0.0) -> None:
    """Refuse by name what there is no formula for here.

    Raises:
        ValueError: no DDPM or DDIM scheduler, or a setting that is out of range.
        NotImplementedError: thresholding or a learned variance.
    """
    if not isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        raise ValueError(f"{type(scheduler).__name__} is not a DDPMScheduler or a DDIMScheduler")
    check_alphas_cumprod(scheduler)
    config, is_ddpm = scheduler.config, isinstance(scheduler, DDPMScheduler)
    if type(config.steps_offset) is not int or config.steps_offset < 0:
        raise ValueError(f"steps_offset={config.steps_offset!r} must be a whole number, 0 or more")
    if config.timestep_spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing={config.timestep_spacing!r} must be one of {', '.join(SPACINGS)}")
    if config.clip_sample and not is_positive(config.clip_sample_range):
        raise ValueError(f"clip_sample_range={config.clip_sample_range!r} must be a finite number above 0")
    if config.thresholding:
        raise NotImplementedError("thresholding=True is not implemented; clip_sample is")
    if is_ddpm and config.variance_type in SIGMA_LEARNED:
        raise NotImplementedError(f"variance_type={config.variance_type!r} is not implemented")
    if is_ddpm and config.variance_type not in FIXED_VARIANCES:
        raise ValueError(f"variance_type={config.variance_type!r} must be one of {', '.join(FIXED_VARIANCES)}")
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={config.prediction_type!r} must be one of {', '.join(PREDICTION_TYPES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be in [0, 1]")
    if eta > 0 and is_ddpm:
        raise ValueError(f"eta={eta} belongs to DDIM; a DDPMScheduler takes its noise from variance_type")


def is_positive(value: Any) -> bool:
    """Whether a value of a config is a finite number above 0."""
    return isinstance(value, int | float) and 0 < value < math.inf
