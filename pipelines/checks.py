"""What a network and its scheduler must be like to sample from them; each refusal names the setting."""

import math
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from pipelines.class_conditional import is_transformer, null_label

SIGMA_LEARNED = ("learned", "learned_range")
SPACINGS = ("linspace", "leading", "trailing")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def sample_shape(network_config: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of what a network with this config makes: images, or latents.

    Raises:
        ValueError: it takes conditions other than class labels, or does not name its size.
    """
    channels, size = network_config.get("in_channels", 3), network_config.get("sample_size")
    if embedding := network_config.get("class_embed_type"):
        raise ValueError(f"the network has class_embed_type={embedding!r}; only plain class labels are known here")
    outputs = network_config.get("out_channels", channels)
    is_learned_variance = is_transformer(network_config) and outputs == 2 * channels  # of DiT, which is not used here
    if outputs not in (channels, None) and not is_learned_variance:
        raise ValueError(f"the network has in_channels={channels} but out_channels={outputs}")
    if size is None:
        raise ValueError("the network's config has no sample_size, so the images' size is not known")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    for value in (channels, height, width):
        if type(value) is not int or value < 1:
            raise ValueError(f"the network has in_channels={channels!r}, sample_size={size!r}: not whole numbers > 0")
    return channels, height, width


def without_private(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config without the entries about versions and folders."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def vae_factor(vae_config: dict[str, Any]) -> int:
    """f: pixels of an image for each of its latents, along a side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def image_shape(network_config: dict[str, Any], vae_config: dict[str, Any] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network makes, and its VAE if it has one; see `sample_shape`."""
    shape = sample_shape(network_config)
    if vae_config is None:
        return shape
    if vae_config["latent_channels"] != shape[0]:
        latents = vae_config["latent_channels"]
        raise ValueError(f"the network makes {shape[0]} channels, and the VAE has latent_channels={latents}")
    factor = vae_factor(vae_config)
    return vae_config["out_channels"], factor * shape[1], factor * shape[2]


def check_vae_config(config: dict[str, Any]) -> None:
    """Refuse a VAE whose latents are not just multiplied by `scaling_factor`: diffusers' pipelines for the networks
    here know nothing else. Raises ValueError."""
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ValueError(f"the VAE has {name}={config[name]!r}, which diffusers' pipeline would not undo")
    factor = config.get("scaling_factor")
    if not is_positive(factor):
        raise ValueError(f"the VAE has scaling_factor={factor!r}: not a finite number above 0")


def check_forward(network: torch.nn.Module, shape: tuple[int, int, int]) -> None:
    """Call a network of shapes alone, made on the meta device: samples [C, H, W] must come out as they went in.

    Raises:
        ValueError: they come out in another shape.
        Exception: whatever a setting leads to that only shows when the network is called.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        samples, zeros = torch.empty(2, *shape), torch.zeros(2, dtype=torch.long)
        class_labels = None if null_label(network.config) is None else zeros
        output = network(samples, zeros, class_labels=class_labels, return_dict=False)[0]
    if output[:, : shape[0]].shape != samples.shape:
        raise ValueError(f"samples of {list(shape)} come out as {list(output.shape[1:])}")


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
