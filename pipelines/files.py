"""Files that are complete whenever they exist."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def named_save_errors(path: Path) -> Iterator[None]:
    """Whatever goes wrong while saving (each library has its own error for a full disk) becomes an OSError that names
    the file and the space left."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(Path(path).parent).free
        raise OSError(f"{path} could not be saved ({free / 1e6:,.1f} MB are free): {error}") from error


def write_and_rename(path: Path, partial: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill `partial`, a file beside `path`, then rename it: `path` is complete whenever it exists.

    What a killed run has left at `partial` goes first, as a link there must not be written through; what fails leaves
    nothing.

    Raises:
        OSError: it could not be saved.
    """
    with named_save_errors(path):
        try:
            partial.unlink(missing_ok=True)
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
