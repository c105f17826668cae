"""The settings of a network that somebody has saved."""

from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel

from pipelines import Network
from pipelines.checks import without_private

SUBFOLDERS = (None, "unet", "transformer")  # a network's own folder, or a pipeline's
FLAGS = {"UNet2DModel": "--model unet", "DiTTransformer2DModel": "--model dit"}
FORMER_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}  # as facebook/DiT-XL-2-256 has it
TELLTALES = {UNet2DModel: "block_out_channels", DiTTransformer2DModel: "patch_size"}  # settings without a class


def load_network_config(name_or_path: str, network_class: type[Network]) -> dict[str, Any]:
    """The settings of a saved network: a folder, a pipeline's folder, a JSON file or a Hub id.

    Raises:
        ValueError: there are none, or they are of something else.
    """
    flag, expected = f"--model_config_name_or_path {name_or_path}", network_class.__name__
    try:
        config = dict(load_first_config(name_or_path, network_class))
    except Exception as error:  # of the file system, the Hub, JSON, or a JSON list
        raise ValueError(f"{flag}: no {expected}'s config: {error}") from error
    kind = config.get("_class_name", expected)
    kind = FORMER_NAMES.get(kind, kind)
    if kind != expected or TELLTALES[network_class] not in config:
        hint = f" ({FLAGS[kind]})" if kind in FLAGS else ""
        found = f"a {kind}'s{hint}" if kind != expected else f"one without {TELLTALES[network_class]}"
        raise ValueError(f"{flag}: no {expected}'s config, but {found}")
    return without_private(config)


def load_first_config(name_or_path: str, network_class: type[Network]) -> dict[str, Any]:
    """The first config.json that there is; OSError if there is none."""
    errors = []
    for subfolder in SUBFOLDERS:
        try:
            return network_class.load_config(name_or_path, subfolder=subfolder)
        except OSError as error:
            errors.append(error)
    raise errors[0]
