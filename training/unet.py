"""The `UNet2DModel` to train."""

from typing import Any


def unet_config(
    settings: dict[str, Any],
    saved: dict[str, Any] | None,
    channels: int,
    resolution: int,
    num_classes: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of the `UNet2DModel` to train: DDPM's, or the `saved` ones, with `settings` over them.

    Raises:
        ValueError: settings that the data decide, or of conditions other than class labels.
    """
    config = default_unet_config(resolution) if saved is None else saved
    by_data = {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    if num_classes is not None:
        by_data["num_class_embeds"] = num_classes + 1  # and the null class
    for name in by_data.keys() & settings.keys():
        if settings[name] != by_data[name]:
            raise ValueError(f"--unet {name} {settings[name]}: the images decide that, which have {by_data[name]}")
    config = config | settings | by_data
    if config.get("class_embed_type"):
        raise ValueError(f"--unet class_embed_type {config['class_embed_type']}: only plain class labels are known")
    if num_classes is None and config.get("num_class_embeds"):
        flag = "--unet" if "num_class_embeds" in settings else "--model_config_name_or_path"
        raise ValueError(f"{flag} num_class_embeds {config['num_class_embeds']}: needs --class_conditional")
    return config


def check_resolution(resolution: int, levels: int) -> None:
    """Refuse a side that the U-Net's levels cannot halve. Raises ValueError."""
    if resolution % 2 ** (levels - 1):
        raise ValueError(
            f"--resolution {resolution}: a U-Net of {levels} levels needs a multiple of {2 ** (levels - 1)}; choose "
            "another, or fewer block_out_channels in --unet"
        )


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
