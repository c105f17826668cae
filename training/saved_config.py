"""The settings of a network that somebody has saved."""

from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel

from pipelines import Network

SUBFOLDERS = {UNet2DModel: "unet", DiTTransformer2DModel: "transformer"}  # of a pipeline
FORMER_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}  # as facebook/DiT-XL-2-256 has it
TELLTALES = {UNet2DModel: "block_out_channels", DiTTransformer2DModel: "patch_size"}  # settings without a class


def load_network_config(name_or_path: str, network_class: type[Network]) -> dict[str, Any]:
    """The settings of a saved network: a folder, a pipeline's folder, a JSON file or a Hub id.

    Raises:
        ValueError: there are none, or they are of something else.
    """
    flag, expected = f"--model_config_name_or_path {name_or_path}", network_class.__name__
    try:
        try:
            config = network_class.load_config(name_or_path)
        except OSError:  # no config.json: a pipeline's
            config = network_class.load_config(name_or_path, subfolder=SUBFOLDERS[network_class])
        config = dict(config)
    except Exception as error:  # of the file system, the Hub, JSON, or a JSON list
        raise ValueError(f"{flag}: no {expected}'s config: {error}") from error
    kind = config.get("_class_name", expected)
    kind = FORMER_NAMES.get(kind, kind)
    if kind != expected or TELLTALES[network_class] not in config:
        found = f"a {kind}'s" if kind != expected else f"one without {TELLTALES[network_class]}"
        raise ValueError(f"{flag}: no {expected}'s config, but {found}")
    return {name: value for name, value in config.items() if not name.startswith("_")}
