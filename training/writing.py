"""What a run writes before its first update, and after the last."""

import logging

from images import ImageDataset
from recipes import save_options

from .checkpoints import discard_checkpoints_after
from .hub import HubUpload
from .log import TrainingLog
from .options import TrainingOptions
from .output import NOT_SAVED, OPTIONS_FILE, SUMMARY_FILE, OutputDir
from .plots import plot_timestep_density, plot_validation_loss
from .report import print_summary, write_model_card, write_summary
from .results import Results
from .resuming import Start, is_elsewhere
from .saving import replace_file
from .state import TrainingState

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
        if options.overwrite_output_dir and not start.checkpoint:
            output.delete_results()
        for path in discard_checkpoints_after(output, state.step):
            logger.warning(f"{path} is discarded: the run goes on from {start.checkpoint or 'the beginning'}")
        output.delete([SUMMARY_FILE])  # it says that a run has come to its end
        replace_file(output.path(OPTIONS_FILE), lambda path: save_options(options, path, NOT_SAVED))
    if start.checkpoint and is_elsewhere(start.checkpoint, output):
        state.save(output, options.checkpoints_total_limit)


def finish(
    options: TrainingOptions,
    state: TrainingState,
    log: TrainingLog,
    results: Results,
    stop_reason: str,
    dataset: ImageDataset,
    hub: HubUpload,
) -> None:
    """Save what the run has come to; after a signal, only what is needed to go on."""
    output, num_skipped = log.output, len(dataset.bad_images)
    is_complete = stop_reason != "signal"
    if not is_complete or options.checkpointing_steps:
        state.save(output, options.checkpoints_total_limit)
    results.save_pipeline()
    if is_complete:
        if state.step % options.logging_steps:
            log.write(num_skipped, last=True)
        if options.validation_steps and state.step % options.validation_steps:
            results.log_validation_loss(last=True)
        results.save_samples("final")
    if state.accelerator.is_main_process:
        plot_timestep_density(log.path, output.path("timestep_density.png"), options.ddpm_num_steps)
        if options.validation_steps:
            plot_validation_loss(log.path, output.path("validation_loss.png"), options.ddpm_num_steps)
        summary = write_summary(state, log, stop_reason, dataset.contents(), num_skipped)
        write_model_card(options, output, summary, hub.repository)
        print_summary(options, summary)
        if is_complete:
            hub.upload()
