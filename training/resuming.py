"""What a run that goes on from a checkpoint must have in common with the run that saved it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import UNet2DModel

from images import ImageError
from recipes import changed_options

from .checkpoints import list_checkpoints
from .folder_lock import LOCK_FILE
from .models import unet_config, unet_on_meta
from .output import NOT_SAVED, OPTIONS_FILE, OutputDir

logger = logging.getLogger(__name__)


def check_resumed_folder(output: OutputDir, checkpoint: Path | None) -> None:
    """Refuse to go on from another run's checkpoint in a folder that is not empty.

    Raises:
        ValueError: naming both.
    """
    others = {path.name for path in output.folder.iterdir()} - {LOCK_FILE}
    if checkpoint and others and is_elsewhere(checkpoint, output):
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: is of another run than the one in --output_dir {output}; choose "
            "an empty --output_dir, or go on with the run in this one by --resume_from_checkpoint latest"
        )


def is_elsewhere(checkpoint: Path, output: OutputDir) -> bool:
    """Whether a checkpoint is not in the run's own folder."""
    return checkpoint.parent.resolve() != output.folder.resolve()


def check_same_network(options, saved_config: dict | None, checkpoint: Path) -> None:
    """Refuse to go on with a network whose weights have other shapes than the checkpoint's.

    Args:
        saved_config: the `UNet2DModel`'s in the checkpoint; None in one of an earlier version, whose weights tell.

    Raises:
        ValueError: naming the settings that differ.
    """
    if saved_config is None:
        return
    saved, now = saved_config, unet_config(options, saved_config["in_channels"], saved_config["sample_size"])
    if parameter_shapes(saved) != parameter_shapes(now):
        defaults = dict(UNet2DModel().config)
        now = {name: now.get(name, default) for name, default in defaults.items()}
        differ = [name for name in defaults if plain(saved.get(name)) != plain(now[name])]
        listed = "; ".join(f"{name} was {saved.get(name)}, now {now[name]}" for name in differ)
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: is of another network than --unet and "
            f"--model_config_name_or_path describe: {listed}"
        )


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def parameter_shapes(config: dict) -> list[tuple]:
    unet = unet_on_meta({name: value for name, value in config.items() if not name.startswith("_")})
    return [(name, tuple(parameter.shape)) for name, parameter in unet.named_parameters()]


def warn_of_changed_options(options, checkpoint: Path) -> None:
    """Name the options that were others when the run that is gone on from was last started."""
    left_out = (*NOT_SAVED, "output_dir")
    for name, (old, new) in changed_options(options, checkpoint.parent / OPTIONS_FILE, left_out).items():
        logger.warning(f"resuming with --{name} {new}, which was {old}")


def warn_of_changed_data(dataset, saved: dict | None) -> None:
    """Say so if the images are not those that the checkpoint's run was trained on.

    Args:
        saved: {"images", "fingerprint"} of the checkpoint; None in one of an earlier version.
    """
    if saved is None or saved["fingerprint"] == dataset.fingerprint():
        return
    logger.warning(
        f"{dataset.name} has changed since the checkpoint was saved: {saved['images']:,} images then, "
        f"{len(dataset):,} now; the order of the images is another"
    )


def override_settings(optimizer, lr_scheduler, settings: dict) -> None:
    """Let flags override what a checkpoint has brought of the optimiser's settings, and keep its state."""
    for group in optimizer.param_groups:
        group.update(settings, initial_lr=settings["lr"])
    lr_scheduler.base_lrs = [settings["lr"]] * len(lr_scheduler.lr_lambdas)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = settings["lr"] * factor(lr_scheduler.last_epoch)


@contextmanager
def last_good_checkpoint(output: OutputDir) -> Iterator[None]:
    """What ends a run under way says from where the run can go on."""
    try:
        yield
    except (FloatingPointError, OSError, ImageError) as error:
        checkpoints = list_checkpoints(output.folder)
        last = f"the last good checkpoint is {checkpoints[-1][1]}" if checkpoints else "there is no checkpoint yet"
        hint = " (go on with --resume_from_checkpoint latest)" if checkpoints else ""
        raise type(error)(f"{error}; {last}{hint}") from error
