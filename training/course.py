"""What a run writes: before its first update, between two, and after the last."""

import logging
from collections.abc import Callable

from images import ImageBatches, ImageDataset
from recipes import save_options

from .checkpoints import discard_checkpoints_after
from .hub import HubUpload
from .log import TrainingLog
from .options import TrainingOptions
from .output import NOT_SAVED, OPTIONS_FILE, OutputDir
from .plots import plot_timestep_density, plot_validation_loss
from .report import print_summary, write_model_card, write_summary
from .results import Results
from .resuming import Start, is_elsewhere
from .saving import replace_file
from .state import TrainingState
from .stopping import Interval

logger = logging.getLogger(__name__)


def begin_writing(
    options: TrainingOptions, output: OutputDir, start: Start, state: TrainingState, hub: HubUpload
) -> None:
    """Make the output folder that of this run: what it replaces or gives up is deleted, and its options are written.

    A checkpoint of another folder, which this run goes on from, is saved here at once.
    """
    if state.accelerator.is_main_process:
        hub.create()
        output.remove_partial_saves()
        if options.overwrite_output_dir:
            output.delete_results()
        for path in discard_checkpoints_after(output, state.step):
            logger.warning(f"{path} is discarded: the run goes on from {start.checkpoint or 'the beginning'}")
        replace_file(output.path(OPTIONS_FILE), lambda path: save_options(options, path, NOT_SAVED))
    if start.checkpoint and is_elsewhere(start.checkpoint, output):
        state.save(output, options.checkpoints_total_limit)


def plan_events(
    options: TrainingOptions,
    state: TrainingState,
    output: OutputDir,
    log: TrainingLog,
    results: Results,
    batches: ImageBatches,
) -> list[tuple[Interval, Callable[[], None]]]:
    """[(when, what)] to do between two updates, in this order."""
    grids, pipelines = options.save_images_epochs or 0, options.save_model_epochs or 0
    return [
        (Interval(state, steps=options.logging_steps), lambda: log.write(batches.skipped)),
        (Interval(state, images=grids * batches.num_images), lambda: results.save_samples(f"step-{state.step:07d}")),
        (Interval(state, steps=options.eval_steps, seconds=options.eval_seconds), results.save_score),
        (Interval(state, steps=options.validation_steps), results.save_validation_loss),
        (Interval(state, images=pipelines * batches.num_images), results.save_pipeline),
        (
            Interval(state, steps=options.checkpointing_steps),
            lambda: state.save(output, options.checkpoints_total_limit),
        ),
    ]


def finish(
    options: TrainingOptions,
    state: TrainingState,
    output: OutputDir,
    log: TrainingLog,
    results: Results,
    stop_reason: str,
    dataset: ImageDataset,
    batches: ImageBatches,
    hub: HubUpload,
) -> None:
    """Save what the run has come to; after a signal, only what is needed to go on."""
    is_complete = stop_reason != "signal"
    if not is_complete or options.checkpointing_steps:
        state.save(output, options.checkpoints_total_limit)
    results.save_pipeline()
    if is_complete:
        if state.step % options.logging_steps:
            log.write(batches.skipped, last=True)
        if options.validation_steps and state.step % options.validation_steps:
            results.save_validation_loss(last=True)
        results.save_samples("final")
    if state.accelerator.is_main_process:
        plot_timestep_density(log.path, output.path("timestep_density.png"), options.ddpm_num_steps)
        if options.validation_steps:
            plot_validation_loss(log.path, output.path("validation_loss.png"), options.ddpm_num_steps)
        summary = write_summary(state, log, stop_reason, dataset.contents(), batches.skipped)
        write_model_card(options, output, summary, hub.repository)
        print_summary(options, summary)
        if is_complete:
            hub.upload()
