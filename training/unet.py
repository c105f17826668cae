"""The `UNet2DModel` to train, from options."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DModel

from pipelines.checks import check_forward

from .options import ModelOptions


def build_unet(options: ModelOptions, channels: int, resolution: int, num_classes: int | None = None) -> UNet2DModel:
    """The `UNet2DModel` to train: DDPM's, or that of `--model_config_name_or_path`, with `--unet` over it.

    Args:
        num_classes: that it is to know, beside the null class; None for a network without classes.

    Raises:
        ValueError: settings that UNet2DModel refuses, be it when it is built or when it is called; or a resolution that
            its levels cannot halve.
    """
    config = unet_config(options, channels, resolution, num_classes)
    with _named_unet_errors(options):
        levels = len(unet_on_meta(config).config.block_out_channels)
        if resolution % 2 ** (levels - 1) == 0:
            check_forward(unet_on_meta(config), (channels, resolution, resolution))
            return UNet2DModel(**config)
    raise ValueError(
        f"--resolution {resolution}: a U-Net of {levels} levels needs a multiple of {2 ** (levels - 1)}; choose "
        "another, or fewer block_out_channels in --unet"
    )


def unet_on_meta(config: dict[str, Any]) -> UNet2DModel:
    """A `UNet2DModel` whose weights have shapes alone: it takes no memory, and moves no random state."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return UNet2DModel(**config)


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


def unet_config(
    options: ModelOptions, channels: int, resolution: int, num_classes: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of the `UNet2DModel` to train."""
    if options.model_config_name_or_path:
        config = load_unet_config(options.model_config_name_or_path)
    else:
        config = default_unet_config(resolution)
    by_data = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    if num_classes is not None:
        by_data["num_class_embeds"] = num_classes + 1  # and the null class
    for name in by_data.keys() & options.unet.keys():
        if options.unet[name] != by_data[name]:
            raise ValueError(f"--unet {name} {options.unet[name]}: the images decide that, which have {by_data[name]}")
    config = config | options.unet | by_data
    if config.get("class_embed_type"):
        raise ValueError(f"--unet class_embed_type {config['class_embed_type']}: only plain class labels are known")
    if num_classes is None and config.get("num_class_embeds"):
        flag = "--unet" if "num_class_embeds" in options.unet else "--model_config_name_or_path"
        raise ValueError(f"{flag} num_class_embeds {config['num_class_embeds']}: needs --class_conditional")
    return config


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
