"""The network to train, from options: a `UNet2DModel` or a `DiTTransformer2DModel`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from pipelines import Network, is_transformer
from pipelines.checks import check_forward

from .dit import DEFAULT, PRESETS, dit_config, make_dit
from .options import ModelOptions
from .saved_config import load_network_config
from .unet import check_resolution, unet_config

FOUND_GOOD: set[str] = set()  # networks tried out by this process: of a race's fifty entrants most have the same one


def build_network(options: ModelOptions, channels: int, resolution: int, num_classes: int | None = None) -> Network:
    """The network to train, from `--model` with `--unet` or `--dit` over it, or `--model_config_name_or_path`.

    Args:
        channels, resolution: of what it makes, images or latents.
        num_classes: that it is to know, beside the null class; None for an unconditional network.

    Raises:
        ValueError: settings that its class refuses, be it when it is built or when it is called; or a resolution that
            its levels cannot halve, or its patches do not divide.
    """
    config = check_network(options, channels, resolution, num_classes)
    with named_network_errors(options):
        network = make_dit(config) if options.is_dit else UNet2DModel(**config)
    if options.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network


def check_network(
    options: ModelOptions, channels: int, resolution: int, num_classes: int | None = None
) -> dict[str, Any]:
    """Try the network of `build_network` without any memory for it. Returns keyword arguments of its class.

    Raises:
        ValueError: as `build_network`.
    """
    config = network_config(options, channels, resolution, num_classes)
    tried = json.dumps([options.is_dit, config, channels, resolution], sort_keys=True, default=str)
    if tried not in FOUND_GOOD:
        with named_network_errors(options):
            on_meta = network_on_meta(config)
        if not options.is_dit:
            check_resolution(resolution, len(on_meta.config.block_out_channels))
        with named_network_errors(options):
            check_forward(on_meta, (channels, resolution, resolution))
        FOUND_GOOD.add(tried)
    return config


def network_config(
    options: ModelOptions, channels: int, resolution: int, num_classes: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of the network's class; see `build_network`."""
    saved = None
    if options.model_config_name_or_path:
        saved = load_network_config(options.model_config_name_or_path, network_class(options))
    if not options.is_dit:
        return unet_config(options.unet, saved, channels, resolution, num_classes)
    preset = PRESETS[DEFAULT if options.model == "dit" else options.model]
    return dit_config(options.dit, saved or preset, channels, resolution, num_classes)


def network_class(options: ModelOptions) -> type[Network]:
    return DiTTransformer2DModel if options.is_dit else UNet2DModel


def network_on_meta(config: dict[str, Any]) -> Network:
    """A network whose weights have shapes alone: it takes no memory, and moves no random state. With the blocks of a
    transformer sharing an embedding."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return make_dit(config) if class_of(config) is DiTTransformer2DModel else UNet2DModel(**config)


def class_of(config: dict[str, Any]) -> type[Network]:
    """The class that a network's settings are of."""
    return DiTTransformer2DModel if is_transformer(config) else UNet2DModel


@contextmanager
def named_network_errors(options: ModelOptions) -> Iterator[None]:
    """Whatever diffusers and torch raise for settings that they cannot use, with the flag that they came from."""
    try:
        yield
    except Exception as error:
        name = "dit" if options.is_dit else "unet"
        flag = f"--{name} {json.dumps(getattr(options, name))}"
        if options.model_config_name_or_path:
            flag = f"--model_config_name_or_path {options.model_config_name_or_path} with {flag}"
        kind = network_class(options).__name__
        raise ValueError(f"{flag}: {kind} cannot use it: {type(error).__name__}: {error}") from error
