"""What is kept when a run fails under way."""

from collections.abc import Iterator
from contextlib import contextmanager

from images import ImageError

from .checkpoints import list_checkpoints
from .output import OutputDir
from .state import TrainingState


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


@contextmanager
def checkpoint_if_data_fails(state: TrainingState, output: OutputDir, total_limit: int) -> Iterator[None]:
    """Save the state where images that were there when the run began cannot be read any more.

    Of several processes none does: the others wait for this one in the next update."""
    try:
        yield
    except (ImageError, OSError):
        if state.accelerator.num_processes == 1:
            state.save(output, total_limit)
        raise
