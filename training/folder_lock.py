"""A folder that one process at a time writes to."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUse(ValueError):
    """Another process holds it."""


@contextmanager
def folder_lock(folder: Path | str, flag: str = "--output_dir") -> Iterator[None]:
    """Create `folder` if need be, and hold it for this process as long as the block lasts.

    The lock is a POSIX record lock on FOLDER/.lock: the kernel drops it when the process ends, in whatever way, network
    file systems pass it on to other hosts, and forked data workers do not inherit it. A file system without locks is
    left to what the lock file says: that refuses a second process on the same host, and warns of others.
    The lock file goes at the end of the block, and so do folders that were made for it and are still empty.

    Args:
        folder: which to hold.
        flag: what the user called it by, for the error.

    Raises:
        FolderInUse: another process holds it, which is named.
        ValueError: it cannot be made or written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is a file, not a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder / LOCK_FILE, f"{flag} {folder}")
    except OSError as error:
        _remove_empty(made)
        raise ValueError(f"{flag} {folder}: cannot be written to: {error.strerror or error}") from error
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()
        _remove_empty(made)


def _lock(path: Path, named_folder: str) -> TextIO:
    """The lock file, open, locked, and naming this process."""
    while True:
        file = path.open("a+")  # what is in it names the holder, so it is not emptied yet
        try:
            if not _lock_file(file):
                raise FolderInUse(f"{named_folder}: is in use by {_holder(path)}; wait for its end, or choose another")
            if _is_same_file(file, path):  # and not one that its holder has just removed
                file.truncate(0)
                file.write(json.dumps(_this_process()))
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock_file(file: TextIO) -> bool:
    """Whether the file could be locked."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no record locks on this system")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS_HERE:
            raise
        logger.warning(f"{file.name}: this file system has no locks; start no other run in this folder on another host")
        return not _is_alive(_read_holder(Path(file.name)))
    return True


def _is_same_file(file: TextIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _this_process() -> dict:
    return {"host": socket.gethostname(), "pid": os.getpid(), "created": psutil.Process().create_time()}


def _read_holder(path: Path) -> dict:
    """What the holder has written of itself; {} where it has not come to that."""
    try:
        holder = json.loads(path.read_text())
        return holder if {"host", "pid", "created"} <= holder.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _holder(path: Path) -> str:
    holder = _read_holder(path)
    return f"process {holder['pid']} on host {holder['host']}" if holder else "another process"


def _is_alive(holder: dict) -> bool:
    """Whether the process that wrote this is one of this host, and has not ended."""
    if not holder or holder["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["created"]) < 1
    except psutil.NoSuchProcess:
        return False


def _remove_empty(folders: list[Path]) -> None:
    """Remove these folders, innermost first, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
