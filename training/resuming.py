"""Where a run begins: at nothing, or at a checkpoint, with which it must have some things in common."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from images import check_output_outside_data
from pipelines import is_transformer, null_label
from pipelines.checks import without_private
from recipes import changed_options

from .checkpoints import checkpoint_damage, find_checkpoint, list_checkpoints, read_process_state
from .folder_lock import LOCK_FILE
from .network import network_config, network_on_meta
from .options import ClassOptions, ModelOptions, TrainingOptions
from .output import NOT_SAVED, OPTIONS_FILE, SUMMARY_FILE, OutputDir, check_output_dir
from .saving import read_json
from .vae import identify_vae, load_vae

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a run begins: `checkpoint` is None at the beginning, and `process_state` what it holds of this process."""

    checkpoint: Path | None
    process_state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.process_state.get("step", 0)

    @property
    def images(self) -> int:
        """Seen so far, by all processes together."""
        return self.process_state.get("images", 0)


def find_start(options: TrainingOptions, output: OutputDir, accelerator: Accelerator) -> Start:
    """Where the run of these options begins. Nothing is changed.

    Raises:
        ValueError: the folder is not one that it may write to, or there is nothing to go on from; naming the flag.
    """
    checkpoint = None
    if accelerator.is_main_process:  # which decides for all
        check_output_outside_data(options.output_dir, options.dataset_name)
        if options.latents_dir:
            check_output_outside_data(options.latents_dir, options.dataset_name, "--latents_dir")
        if not options.dry_run:  # which writes nothing
            check_output_dir(
                output,
                resume=bool(options.resume_from_checkpoint),
                overwrite=options.overwrite_output_dir and not options.resume_from_checkpoint,  # then, later ones alone
                checkpoints=bool(list_checkpoints(output.folder)),
            )
        if options.resume_from_checkpoint:
            checkpoint = find_checkpoint(output.folder, options.resume_from_checkpoint, logger.warning)
            check_resumed_folder(output, checkpoint)
            if options.resume_from_checkpoint != "latest" and not (options.overwrite_output_dir or options.dry_run):
                check_nothing_is_later(output, checkpoint)
            if not checkpoint and not options.dry_run:
                logger.warning(f"--resume_from_checkpoint latest: {output} has no checkpoint; a new run begins")
    (checkpoint,) = broadcast_object_list([checkpoint])
    if not checkpoint:
        return Start(None, {})
    process_state = read_process_state(checkpoint, accelerator.process_index)
    if process_state["processes"] != accelerator.num_processes:
        logger.warning(f"resuming with {accelerator.num_processes} processes, which were {process_state['processes']}")
    return Start(checkpoint, process_state)


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


def check_nothing_is_later(output: OutputDir, checkpoint: Path) -> None:
    """Refuse to go back to an earlier step than the run in the folder has come to, as what is later would be lost.
    Damaged checkpoints are lost already.

    Raises:
        ValueError: naming the flag, and how far the run has come.
    """
    if is_elsewhere(checkpoint, output):
        return
    step = read_process_state(checkpoint, 0)["step"]
    later = [
        number for number, path in list_checkpoints(output.folder) if number > step and not checkpoint_damage(path)
    ]
    farthest = max([read_summary(output).get("steps", 0), *later])
    if step < farthest:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: is of step {step}, and the run in --output_dir {output} has come "
            f"to step {farthest}, which would be lost; choose an empty --output_dir, or give --overwrite_output_dir too"
        )


def read_summary(output: OutputDir) -> dict[str, Any]:
    """The summary of the run in the folder; {} where there is none, or it is damaged."""
    try:
        return read_json(output.folder / SUMMARY_FILE)
    except ValueError:
        return {}


def is_elsewhere(checkpoint: Path, output: OutputDir) -> bool:
    """Whether a checkpoint is not in the run's own folder."""
    return checkpoint.parent.resolve() != output.folder.resolve()


def spent_budget(options: TrainingOptions, output: OutputDir, start: Start, max_steps: int | None) -> str | None:
    """That the run in the folder is finished, and which budget, now given, it has spent already; else None.

    A run that was killed before its end has no summary. One that is to be uploaded is gone on with: it may not be yet;
    and a dry run tells of this in its own way.

    Args:
        max_steps: that the budget in steps or epochs allows.
    """
    if not start.checkpoint or options.push_to_hub or options.dry_run:
        return None
    summary = read_summary(output)
    if summary.get("steps") != start.step or summary.get("stopped_by") == "signal":
        return None
    seconds = summary["seconds"].get("train", 0.0)
    if max_steps is not None and start.step >= max_steps:
        by_steps = options.max_train_steps == max_steps
        budget = (
            f"--max_train_steps {max_steps}" if by_steps else f"--num_epochs {options.num_epochs}, {max_steps} steps,"
        )
        spent = f"{start.step} steps"
    elif options.max_train_seconds is not None and seconds >= options.max_train_seconds:
        budget, spent = f"--max_train_seconds {options.max_train_seconds:g}", f"{seconds:.1f} s of training"
    else:
        return None
    return (
        f"nothing to train: {budget} is spent, as the run in {output} has had {spent}; its files are left as they are"
    )


def check_same_network(options: TrainingOptions, start: Start) -> None:
    """Refuse to go on with a network whose weights have other shapes than the checkpoint's.

    One of an earlier version holds no settings of the network: its weights tell, later.

    Raises:
        ValueError: naming the settings that differ.
    """
    saved = start.process_state.get("network") or start.process_state.get("unet")  # as earlier versions call it
    if saved is None:
        return
    if options.is_dit != is_transformer(saved):
        raise ValueError(f"--model {options.model}: the network in {start.checkpoint} is a {saved['_class_name']}")
    if options.class_conditional and null_label(saved) is None:
        raise ValueError(f"--class_conditional: the network in {start.checkpoint} knows no classes")
    num_classes = null_label(saved) if options.class_conditional else None
    now = network_config(options, saved["in_channels"], saved["sample_size"], num_classes)
    if parameter_shapes(saved) != parameter_shapes(now):
        defaults = without_private(network_on_meta(now).config)
        differ = [name for name, value in defaults.items() if plain(saved.get(name)) != plain(value)]
        listed = "; ".join(f"{name} was {saved.get(name)}, now {defaults[name]}" for name in differ)
        raise ValueError(
            f"--resume_from_checkpoint {start.checkpoint}: is of another network than the options (--model, --unet, "
            f"--dit, --model_config_name_or_path) describe: {listed}"
        )


def check_same_vae(options: ModelOptions, start: Start) -> None:
    """Refuse to go on in the latents of another VAE, or of pixels in latents.

    Raises:
        ValueError: naming both.
    """
    saved = (start.process_state.get("data") or {}).get("vae")
    now = identify_vae(load_vae(options.vae)) if options.vae and start.checkpoint else None
    if start.checkpoint and saved != now:
        then, to_be = (f"the latents of VAE {vae}" if vae else "pixels" for vae in (saved, now))
        raise ValueError(
            f"--vae {options.vae}: the network in {start.checkpoint} was trained on {then}, and would go on on {to_be}"
        )


def plain(value: Any) -> Any:
    """A tuple of a config as the list that it is in JSON."""
    return list(value) if isinstance(value, tuple) else value


def parameter_shapes(config: dict) -> list[tuple]:
    network = network_on_meta(without_private(config))
    return [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]


def check_same_classes(options: ClassOptions, identity: dict[str, Any], start: Start) -> None:
    """Refuse to go on with labels that mean something else.

    Args:
        identity: of `training.data.identify`.

    Raises:
        ValueError: naming the classes, then and now.
    """
    saved = start.process_state.get("data") or {}  # not in checkpoints of an earlier version
    if not options.class_conditional or "classes" not in saved:
        return
    if saved["classes"] != identity["classes"]:
        then, now = (", ".join(names or ["none"]) for names in (saved["classes"], identity["classes"]))
        raise ValueError(f"--resume_from_checkpoint {start.checkpoint}: is of the classes {then}; now they are {now}")
    if saved["fingerprint"] == identity["fingerprint"] and saved["labels"] != identity["labels"]:
        raise ValueError(f"--resume_from_checkpoint {start.checkpoint}: the images had other labels then")


def warn_of_changes(options: TrainingOptions, name: str, identity: dict[str, Any], start: Start) -> None:
    """Say what is different from the run that is gone on from: options, when it was last started, and images.

    Args:
        name: of the data set.
        identity: of `training.data.identify`.
    """
    if not start.checkpoint:
        return
    left_out = (*NOT_SAVED, "output_dir")
    changed = changed_options(options, start.checkpoint.parent / OPTIONS_FILE, left_out)
    for option, (old, new) in changed.items():
        logger.warning(f"resuming with --{option} {new}, which was {old}")
    if options.validation_split and "validation_split" in changed:
        logger.warning(
            f"--validation_split {options.validation_split}: the run may have trained on these images before"
        )
    saved = start.process_state.get("data")  # not in checkpoints of an earlier version
    if saved and saved["fingerprint"] != identity["fingerprint"]:
        logger.warning(
            f"{name} has changed since the checkpoint was saved: {saved['images']:,} images then, "
            f"{identity['images']:,} now; the order of the images is another"
        )
