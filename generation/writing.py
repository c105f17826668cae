"""Files that are written while the next images are sampled, each complete whenever it exists."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.files import write_and_rename

Write = Callable[[BinaryIO], Any]


def write_atomically(path: Path, write: Write) -> None:
    """Let `write` fill a temporary file, `path` with .tmp behind it, then rename it: `path` is complete whenever it
    exists. Raises OSError, which says how to go on."""

    def write_partial(partial: Path) -> None:
        with open(partial, "xb") as file:
            write(file)

    try:
        write_and_rename(path, path.with_name(path.name + ".tmp"), write_partial)
    except OSError as error:
        raise OSError(f"{error}; finished images are kept, the same command goes on") from error


class Writer:
    """Writes files on threads while the next batch is sampled; the first error ends the run.

    At most `limit` files wait (of two blocks, say), so that a slow disk slows the sampling down rather than
    filling the memory.
    """

    def __init__(self, limit: int, threads: int = 4):
        self.pool, self.limit = ThreadPoolExecutor(threads), limit
        self.waiting: deque[Future] = deque()

    def submit(self, path: Path, write: Write) -> None:
        """Let a thread write `path`, once there is room in the queue. Raises what an earlier file's writing raised."""
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= self.limit):
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(write_atomically, path, write))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self.waiting:
                future.result()
