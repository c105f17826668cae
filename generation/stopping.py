"""How a signal ends a run: in one line, which says how far it has come."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from generation.formats import GeneratedFiles
from recipes import is_main_process


class Stopped(BaseException):
    """SIGINT (Ctrl-C) or SIGTERM has come. No Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int, message: str = "nothing was written"):
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.number = number


@contextmanager
def exit_when_stopped() -> Iterator[None]:
    """Make a signal end the block at once, with one line and the shell's exit status for it, 128 + its number."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        if is_main_process():
            print(f"{Path(sys.argv[0]).name}: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)


@contextmanager
def report_when_stopped(files: GeneratedFiles) -> Iterator[None]:
    """Tell, if a signal ends the block, how far the run has come."""
    try:
        yield
    except Stopped as stopped:
        done = files.num_images - sum(map(len, files.missing()))
        message = f"{done} of {files.num_images} images are in {files.output_dir}; the same command goes on"
        raise Stopped(stopped.number, message) from None
