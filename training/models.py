"""The network, the noise schedule and the timestep sampler, from options."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from pipelines import denoising_steps
from samplers import PARTS, Method, NoiseSchedule, TimestepSampler, make_timestep_sampler, resolve_method

from .options import MethodOptions, ModelOptions


def build_unet(options: ModelOptions, channels: int, resolution: int) -> UNet2DModel:
    """The `UNet2DModel` to train: DDPM's, or that of `--model_config_name_or_path`, with `--unet` over it.

    Raises:
        ValueError: settings that UNet2DModel refuses, be it when it is built or when it is called; or a resolution that
            its levels cannot halve.
    """
    config = unet_config(options, channels, resolution)
    with _named_unet_errors(options):
        levels = len(unet_on_meta(config).config.block_out_channels)
        if resolution % 2 ** (levels - 1) == 0:
            try_forward(unet_on_meta(config), channels, resolution)
            return UNet2DModel(**config)
    raise ValueError(
        f"--resolution {resolution}: a U-Net of {levels} levels needs a multiple of {2 ** (levels - 1)}; choose "
        "another, or fewer block_out_channels in --unet"
    )


def unet_config(options: ModelOptions, channels: int, resolution: int) -> dict[str, Any]:
    """Keyword arguments of the `UNet2DModel` to train."""
    if options.model_config_name_or_path:
        config = load_unet_config(options.model_config_name_or_path)
    else:
        config = default_unet_config(resolution)
    by_data = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    for name in by_data.keys() & options.unet.keys():
        if options.unet[name] != by_data[name]:
            raise ValueError(f"--unet {name} {options.unet[name]}: the images decide that, which have {by_data[name]}")
    return config | options.unet | by_data


def unet_on_meta(config: dict[str, Any]) -> UNet2DModel:
    """A `UNet2DModel` whose weights have shapes alone: it takes no memory, and moves no random state."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return UNet2DModel(**config)


def try_forward(unet: UNet2DModel, channels: int, resolution: int) -> None:
    """Call the network on tensors that have a shape alone.

    Raises:
        Exception: whatever a setting leads to that only shows when the network is called.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        images, timesteps = torch.empty(2, channels, resolution, resolution), torch.zeros(2, dtype=torch.long)
        output = unet(images, timesteps, return_dict=False)[0]
    if output.shape != images.shape:
        raise ValueError(f"images of {list(images.shape[1:])} come out as {list(output.shape[1:])}")


@contextmanager
def _named_unet_errors(options: ModelOptions) -> Iterator[None]:
    """Whatever diffusers and torch raise for settings that they cannot use, with the flag that they came from."""
    try:
        yield
    except Exception as error:
        flag = f"--unet {json.dumps(options.unet)}"
        if options.model_config_name_or_path:
            flag = f"--model_config_name_or_path {options.model_config_name_or_path} with {flag}"
        raise ValueError(f"{flag}: UNet2DModel cannot use it: {type(error).__name__}: {error}") from error


def load_unet_config(name_or_path: str) -> dict[str, Any]:
    """The settings of a saved UNet2DModel: a folder, a pipeline's folder, a JSON file or a Hub id.

    Raises:
        ValueError: there is none, or it is of something else.
    """
    try:
        try:
            config = UNet2DModel.load_config(name_or_path)
        except OSError:  # no config.json: a pipeline's
            config = UNet2DModel.load_config(name_or_path, subfolder="unet")
        config = dict(config)
    except Exception as error:  # of the file system, the Hub, JSON, or a JSON list
        raise ValueError(f"--model_config_name_or_path {name_or_path}: no UNet2DModel's config: {error}") from error
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel" or "block_out_channels" not in config:
        found = f"a {kind}'s" if kind != "UNet2DModel" else "one without block_out_channels"
        raise ValueError(f"--model_config_name_or_path {name_or_path}: no UNet2DModel's config, but {found}")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def default_unet_config(resolution: int) -> dict[str, Any]:
    """DDPM's U-Net (arXiv 2006.11239, appendix B): widths doubled on the way down to 4x4, attention at 16x16.

    At 32x32 these are the settings of google/ddpm-cifar10-32, without its dropout."""
    multipliers = (1, 2, 2, 2) if resolution <= 32 else (1, 1, 2, 2, 4, 4)
    levels = 1
    while levels < len(multipliers) and resolution % 2**levels == 0 and resolution >> levels >= 4:
        levels += 1
    attention = [resolution >> level == 16 for level in range(levels)]
    return {
        "block_out_channels": [128 * multiplier for multiplier in multipliers[:levels]],
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "layers_per_block": 2,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    }


def build_noise_scheduler(options: ModelOptions, planned_num_steps: Iterable[int] = ()) -> DDPMScheduler:
    """The `DDPMScheduler` to train with and to save.

    Args:
        planned_num_steps: numbers of denoising steps in which it must be able to sample, beside that of all timesteps.

    Raises:
        ValueError: a schedule or setting that cannot be used, or a last timestep without any signal.
    """
    settings = {
        "num_train_timesteps": options.ddpm_num_steps,
        "beta_schedule": options.ddpm_beta_schedule,
        "prediction_type": options.prediction_type,
    }
    flags = dict(zip(settings, ("ddpm_num_steps", "ddpm_beta_schedule", "prediction_type"), strict=True))
    for name in settings.keys() & options.noise_scheduler.keys():
        if options.noise_scheduler[name] != settings[name]:
            raise ValueError(f"--noise_scheduler {name} {options.noise_scheduler[name]}: is given by --{flags[name]}")
    given = f"--ddpm_beta_schedule {options.ddpm_beta_schedule} --noise_scheduler {json.dumps(options.noise_scheduler)}"
    try:
        noise_scheduler = DDPMScheduler(**{**settings, **options.noise_scheduler})
        check_alphas_cumprod(noise_scheduler)
        for num_inference_steps in {*planned_num_steps, options.ddpm_num_steps}:  # the last by generate.py
            denoising_steps(noise_scheduler, num_inference_steps)
    except Exception as error:  # diffusers does not check types
        raise ValueError(f"{given}: cannot be used: {type(error).__name__}: {error}") from error
    return noise_scheduler


def check_alphas_cumprod(noise_scheduler: DDPMScheduler) -> None:
    """Refuse a schedule of noise that is not one. Raises ValueError."""
    alphas_cumprod, steps = noise_scheduler.alphas_cumprod, noise_scheduler.config.num_train_timesteps
    if len(alphas_cumprod) != steps:
        raise ValueError(f"trained_betas has {len(alphas_cumprod)} values, and --ddpm_num_steps is {steps}")
    if not ((noise_scheduler.betas > 0).all() and (noise_scheduler.betas <= 1).all()):
        raise ValueError("betas must be in (0, 1]")
    if alphas_cumprod[-1] == 0:
        cause = "rescale_betas_zero_snr" if noise_scheduler.config.rescale_betas_zero_snr else f"{steps} of these betas"
        raise ValueError(
            f"a zero terminal SNR ({cause}) cannot be trained here: objectives are defined on the epsilon-loss, which "
            "says nothing about a network's output where there is no signal"
        )
    if not (torch.cat([torch.ones(1), alphas_cumprod]).diff() < 0).all():
        raise ValueError("betas are so small that alphas_cumprod does not fall from each timestep to the next")


def method_parts(options: MethodOptions) -> dict[str, str | None]:
    """{part: name, or None for the method's own} of a method, as `samplers.make_timestep_sampler` takes them."""
    return {name: getattr(options, name) for name in PARTS}


def method_of(options: MethodOptions) -> Method:
    """The method, with the parts that replace its own."""
    return resolve_method(options.method, **method_parts(options))


def build_sampler(
    options: MethodOptions,
    schedule: NoiseSchedule | DDPMScheduler,
    sample_images: Callable[[], torch.Tensor],
    seed: int,
    device: torch.device | str,
) -> TimestepSampler:
    """The method's timestep sampler.

    Args:
        sample_images: makes a sample of the training data, [N, C, H, W] in [-1, 1], if the method needs one.

    Raises:
        ValueError: names or settings that cannot be used.
    """
    given = dict(options.timestep_sampler_options)
    flag = f"--method {options.method} --timestep_sampler_options {json.dumps(given)}"
    for name in given.keys() & {"seed", "device", "images", "low_discrepancy", *PARTS}:
        raise ValueError(f"{flag}: {name} is no setting of a sampler's class; it has a flag, or is the run's")
    try:
        return make_timestep_sampler(
            schedule,
            options.method,
            **method_parts(options),
            images=sample_images() if method_of(options).needs_images else None,
            low_discrepancy=options.low_discrepancy,
            seed=seed,
            device=device,
            **given,
        )
    except Exception as error:  # the classes check ranges, not types
        raise ValueError(f"{flag}: {error}") from error
