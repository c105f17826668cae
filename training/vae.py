"""The VAE in whose latents a network is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import AutoencoderKL

from pipelines.loading import complete_vae_config, load_component_config, load_network
from pipelines.weights import hash_weights


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
        return complete_vae_config(config)


def identify_vae(vae: AutoencoderKL) -> dict[str, Any]:
    """What its latents depend on, as JSON can hold it."""
    return {"sha256": hash_weights(vae), "scaling_factor": vae.config.scaling_factor}


@contextmanager
def named_vae_errors(name_or_path: str) -> Iterator[None]:
    """ValueError for whatever diffusers raises for a VAE, naming the flag."""
    try:
        yield
    except Exception as error:
        text = str(error).removeprefix(f"{name_or_path}: ")
        raise ValueError(f"--vae {name_or_path}: {text}") from error
