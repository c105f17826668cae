"""The folder a run writes to: claimed before any work, never overwritten unasked."""

import os
import shutil
from pathlib import Path

from .checkpoints import list_checkpoints, remove_partial_checkpoints

OPTIONS_FILE = "training_options.yaml"
SUMMARY_FILE = "training_summary.json"
NOT_SAVED = ("overwrite_output_dir", "resume_from_checkpoint", "hub_token")  # options of one start, or secret
RESULTS = (
    OPTIONS_FILE, "metrics.jsonl", SUMMARY_FILE, "timestep_density.png", "README.md",
    "samples", "model_index.json", "unet", "scheduler",
)  # fmt: skip


def claim_output_dir(options):
    """Create `--output_dir`, or make sure that it may be written to.

    Raises:
        ValueError: it has contents and neither resuming nor overwriting was asked for, or it cannot be written to.
    """
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder}: is not writable")
    if not any(folder.iterdir()):
        return
    is_run = (folder / OPTIONS_FILE).exists() or bool(list_checkpoints(folder))
    if options.overwrite_output_dir and not is_run:
        raise ValueError(
            f"--overwrite_output_dir: {folder} is not empty, and is not the folder of a run; choose another"
        )
    if options.overwrite_output_dir:
        return  # `delete_results` comes when the rest of the set-up has shown that the new run can begin
    if not options.resume_from_checkpoint:
        raise ValueError(
            f"--output_dir {folder}: is not empty. Choose another, go on with the run in it by "
            "--resume_from_checkpoint latest, or delete its results by --overwrite_output_dir"
        )
    is_unfinished = (folder / OPTIONS_FILE).exists() and not (folder / SUMMARY_FILE).exists()
    if not list_checkpoints(folder) and not is_unfinished and options.resume_from_checkpoint == "latest":
        raise ValueError(
            f"--output_dir {folder}: is not empty and has no checkpoint to resume from. Choose another, or delete the "
            "results in it by --overwrite_output_dir"
        )


def delete_results(folder, logging_dir):
    """Delete what a run writes, and nothing else."""
    remove_partial_checkpoints(folder)
    for path in [*(folder / name for name in (*RESULTS, logging_dir)), *(path for _, path in list_checkpoints(folder))]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_disk_space(options, num_parameters):
    """Refuse to start where not even one checkpoint and the pipeline fit: weights, EMA and two Adam moments, float32.

    Raises:
        ValueError: naming the space needed and the space free.
    """
    needed = 4 * num_parameters * (4 + 1)
    free = shutil.disk_usage(options.output_dir).free
    if free < needed:
        raise ValueError(
            f"--output_dir {options.output_dir}: a checkpoint and the pipeline need {needed / 1e6:,.0f} MB, and "
            f"{free / 1e6:,.0f} MB are free"
        )
