"""The VAE in whose latents a network is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import AutoencoderKL

from pipelines.checks import check_vae_config, vae_factor
from pipelines.loading import load_component_config, load_network


def load_vae(name_or_path: str) -> AutoencoderKL:
    """The VAE of `--vae`, in evaluation mode and float32: a folder's or Hub id's own, or that of a pipeline.

    Raises:
        ValueError: there is none, or its weights cannot be used.
    """
    load_vae_config(name_or_path)
    with named_vae_errors(name_or_path):
        return load_network(AutoencoderKL, name_or_path, "vae").eval().requires_grad_(False)


def load_vae_config(name_or_path: str) -> dict[str, Any]:
    """The VAE's settings alone. Raises ValueError: there are none, or not of an AutoencoderKL that can be used."""
    with named_vae_errors(name_or_path):
        config, _ = load_component_config(AutoencoderKL, name_or_path, "vae")
        if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
            raise ValueError(f"is a {kind}, and must be an AutoencoderKL")
        settings = {name: value for name, value in AutoencoderKL.from_config(config).config.items()}
        check_vae_config(settings)
    return settings


def latent_shape(name: str, vae_config: dict[str, Any], channels: int, resolution: int) -> tuple[int, int]:
    """(channels, side) of the latents of images of these.

    Args:
        name: of the VAE, for errors.

    Raises:
        ValueError: images that it does not take.
    """
    factor, taken = vae_factor(vae_config), vae_config["in_channels"]
    if channels != taken:
        mode = {1: "L", 3: "RGB"}.get(taken)
        hint = f": pass --image_mode {mode}" if mode else ""
        raise ValueError(f"--vae {name}: takes images of {taken} channels, and these have {channels}{hint}")
    if resolution % factor:
        raise ValueError(f"--resolution {resolution}: --vae {name} needs a multiple of {factor}")
    return vae_config["latent_channels"], resolution // factor


@contextmanager
def named_vae_errors(name_or_path: str) -> Iterator[None]:
    """ValueError for whatever diffusers raises for a VAE, naming the flag."""
    try:
        yield
    except Exception as error:
        text = str(error).removeprefix(f"{name_or_path}: ")
        raise ValueError(f"--vae {name_or_path}: {text}") from error
