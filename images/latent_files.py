"""Moments of latents in files: blocks of images, each whole whenever it exists, and an index of what they are of."""

import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

INDEX = "index.json"
DTYPE = np.dtype("<f2")
MAX_BLOCK_BYTES = 64 * 2**20  # what a killed run encodes again, at most, for each process
SECONDS_OUT_OF_SIGHT = 60  # NFS remembers for 30 to 60 that a file was not there
MIN_BLOCKS = 64  # so that many processes have about equal shares


class LatentFiles:
    """Moments, float16 [N, V, 2, C, h, w], in a folder:

        index.json          what they are of; it is written first
        moments-00000.json  of the first block: checksum, and {image: why} of those that cannot be decoded
        moments-00000.npy   [images_per_block, V, 2, C, h, w]; less in the last block

    A block is there once its .npy is: that is renamed into place last. A block that was damaged since is an error, and
    is not encoded anew unasked: the disk may be failing, or the file be somebody else's, which a person should know.

    Args:
        shape: (N, V, 2, C, h, w).
        batch_size: of encoding; a block is a multiple of it.
        settings: what the moments depend on, as JSON can hold it.

    Attributes:
        image_bytes: size of the moments of an image.
        settings: as the index has them, with the shape.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], batch_size: int, settings: dict[str, Any]):
        self.folder, self.shape = Path(folder), shape
        self.image_bytes = DTYPE.itemsize * math.prod(shape[1:])
        images = min(MAX_BLOCK_BYTES // self.image_bytes, -(-shape[0] // MIN_BLOCKS))
        self.images_per_block = max(images // batch_size, 1) * batch_size
        self.num_blocks = -(-shape[0] // self.images_per_block)
        own = {"images": shape[0], "images_per_file": self.images_per_block, "moments": shape[1:], "dtype": "float16"}
        self.settings = json.loads(json.dumps(settings | own))  # as it is read again: tuples are lists

    def images_of(self, block: int) -> range:
        first = block * self.images_per_block
        return range(first, min(first + self.images_per_block, self.shape[0]))

    # What is there, and whether it is of these settings

    def missing_blocks(self) -> list[int]:
        """The blocks that are still to be encoded.

        Raises:
            ValueError: the folder is of something else, or there is no room for them; naming --latents_dir.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_index()
        except OSError as error:
            raise ValueError(f"--latents_dir {self.folder}: {error}") from error
        missing = [block for block in range(self.num_blocks) if not os.path.lexists(self._moments(block))]
        needed = sum(len(self.images_of(block)) for block in missing) * self.image_bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"--latents_dir {self.folder}: the latents need {needed / 1e6:,.1f} MB more, and {free / 1e6:,.1f} MB "
                "are free"
            )
        return missing

    def write_index(self) -> None:
        """Say what the folder is of, unless it is said."""
        if not (self.folder / INDEX).exists():
            text = json.dumps(self.settings, indent=1) + "\n"
            _write_whole(self.folder / INDEX, lambda file: file.write(text.encode()))

    def check_is_shared(self) -> None:
        """Raises ValueError if this process does not see the index that the first has written."""
        self._wait_to_see(self.folder / INDEX)

    def _wait_to_see(self, path: Path) -> None:
        """Raises ValueError if what another process has written does not come into sight: network file systems may show
        it late, and a folder of another machine's own disk never."""
        end = time.monotonic() + SECONDS_OUT_OF_SIGHT
        while not path.exists():
            if time.monotonic() > end:
                raise ValueError(
                    f"--latents_dir {self.folder}: must be on a file system that all machines share: {path.name} of "
                    "the main process is not there"
                )
            time.sleep(0.1)

    def _check_index(self) -> None:
        """Raises ValueError unless the folder is empty, or its index has these settings."""
        path = self.folder / INDEX
        if not path.exists():
            # Another process writes the index just now, under a hidden name first; the folder's lock is hidden, too
            others = {name for name in os.listdir(self.folder) if not name.startswith(".")} - {INDEX}
            if others:
                raise ValueError(
                    f"--latents_dir {self.folder}: is not empty, and no folder of latents: it holds {min(others)} and "
                    f"no {INDEX}. Choose another"
                )
            return
        try:
            saved, now = _flat(_read_json(path)), _flat(self.settings)
        except ValueError as error:
            raise ValueError(f"--latents_dir {self.folder}: is no folder of latents: {error}") from error
        names = [name for name in {**now, **saved} if saved.get(name) != now.get(name)]
        if names:
            differences = "; ".join(f"{name} was {saved.get(name)}, now it is {now.get(name)}" for name in names)
            raise ValueError(f"--latents_dir {self.folder}: holds other latents: {differences}. Choose another folder")

    # Blocks

    def write(self, block: int, moments: np.ndarray, bad: dict[int, str]) -> None:
        """Add a block; `bad` maps the images in it that cannot be decoded to the reasons. Raises OSError."""
        moments = np.ascontiguousarray(moments, DTYPE)
        record = {"crc32": _checksum(moments, bad), "bad_images": bad}
        _write_whole(self._record(block), lambda file: file.write(json.dumps(record).encode()))
        _write_whole(self._moments(block), lambda file: np.save(file, moments, allow_pickle=False))
        self._note_intact(block)

    def read(self, block: int) -> np.ndarray:
        """The moments of a block, [images, V, 2, C, h, w], memory-mapped, read-only. Raises ValueError if the file has
        others."""
        path, shape = self._moments(block), (len(self.images_of(block)), *self.shape[1:])
        self._wait_to_see(path)
        try:
            moments = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:  # cut short, or no .npy at all
            raise self._damaged(block, str(error)) from error
        if moments.shape != shape or moments.dtype != DTYPE or not moments.flags.c_contiguous:
            raise self._damaged(block, f"it holds {moments.dtype} {list(moments.shape)}, not float16 {list(shape)}")
        size = moments.offset + moments.nbytes
        if path.stat().st_size != size:
            raise self._damaged(block, "it goes on behind its end")
        # Mapped again, as NumPy keeps the file open: a large data set has more blocks than a process may open files
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        mapped.flags.writeable = False
        return mapped[moments.offset :].view(DTYPE).reshape(shape)

    def bad_images(self, block: int) -> dict[int, str]:
        """{image: why} of those in a block that cannot be decoded; their moments mean nothing. Raises ValueError."""
        return {int(i): why for i, why in self._read_record(block)["bad_images"].items()}

    def check(self, block: int) -> None:
        """Raises ValueError if a block is not what was written: bit for bit, unless neither of its files has been
        written to since that was last found."""
        record, moments = self._read_record(block), self.read(block)
        if self._is_noted_intact(block):
            return
        if _checksum(moments, record["bad_images"]) != record["crc32"]:
            raise self._damaged(block, "its checksum is another")
        self._note_intact(block)

    def _note_intact(self, block: int) -> None:
        """Give the record the time of the moments: whoever writes to either file makes them differ."""
        with suppress(OSError):  # somebody else's files; they are checked each time then
            times = self._moments(block).stat()
            os.utime(self._record(block), ns=(times.st_atime_ns, times.st_mtime_ns))

    def _is_noted_intact(self, block: int) -> bool:
        return self._moments(block).stat().st_mtime_ns == self._record(block).stat().st_mtime_ns

    def _read_record(self, block: int) -> dict[str, Any]:
        try:
            record = _read_json(self._record(block))
        except (OSError, ValueError) as error:
            raise self._damaged(block, f"what is noted of it cannot be read: {error}") from error
        if not isinstance(record.get("bad_images"), dict) or "crc32" not in record:
            raise self._damaged(block, f"{self._record(block).name} holds something else")
        return record

    def _damaged(self, block: int, why: str) -> ValueError:
        return ValueError(f"{self._moments(block)} is damaged: {why}. Delete it, and the same command encodes it anew")

    def _moments(self, block: int) -> Path:
        return self.folder / f"moments-{block:05}.npy"

    def _record(self, block: int) -> Path:
        return self._moments(block).with_suffix(".json")


def saved_settings(folder: Path) -> dict[str, Any]:
    """What the index in a folder says; {} where there is none that can be read."""
    try:
        return _read_json(folder / INDEX)
    except (OSError, ValueError):
        return {}


def _checksum(moments: np.ndarray, bad: dict) -> int:
    return zlib.crc32(json.dumps(bad).encode(), zlib.crc32(moments))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """{"vae": {"sha256": ...}} as {"vae sha256": ...}: what differs is named without what does not."""
    parts = (value.items() if isinstance(value, dict) else [(None, value)] for value in settings.values())
    pairs = zip(settings, parts, strict=True)
    return {f"{name} {key}" if key else name: value for name, part in pairs for key, value in part}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, which names the file, if it holds none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _partial(path: Path) -> Path:
    return path.with_name(f".partial.{path.name}")


def _write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it, once it is on the disk. Raises OSError."""
    partial = _partial(path)
    try:
        partial.unlink(missing_ok=True)  # of a killed run
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}; what is finished is kept") from error
    finally:
        partial.unlink(missing_ok=True)
