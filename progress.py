"""Progress of long work: a bar on a terminal; in a file, a line now and then."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30


def progress_bar(*args: Any, **settings: Any) -> tqdm:
    """A `tqdm` of these arguments. Where stderr is no terminal it writes a line each half minute and one at the end,
    and nothing for work that takes less."""
    if not sys.stderr.isatty():
        seconds = SECONDS_BETWEEN_LINES
        settings |= {"mininterval": seconds, "maxinterval": seconds, "delay": seconds, "file": Lines(sys.stderr)}
    return tqdm(*args, **settings)


class Lines:
    """A stream that makes a line of each thing written to it, in place of what a terminal would draw over."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self.stream.write(f"{text}\n")

    def flush(self) -> None:
        self.stream.flush()
