"""How generated images become files: PNGs, parquet shards or one .npz, each complete whenever it exists.

A format knows which files hold which images, so that a run that was killed can tell what is still missing.
"""

import io
import os
import re
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from pipelines.unconditional import to_pil

Write = Callable[[BinaryIO], Any]


def write_atomically(path: Path, write: Write) -> None:
    """Let `write` fill a temporary file, then rename it: `path` is complete whenever it exists."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # what a killed run has left; a link there must not be written through
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        hint = f"{free:,.1f} MB are free; finished images are kept, the same command goes on"
        raise OSError(f"cannot write {path}: {error}; {hint}") from error


class Writer:
    """Writes files on threads while the next batch is sampled; the first error ends the run.

    At most `limit` files wait (of two blocks, say), so that a slow disk slows the sampling down rather than
    filling the memory.
    """

    def __init__(self, limit: int, threads: int = 4):
        self.pool, self.limit = ThreadPoolExecutor(threads), limit
        self.waiting: deque[Future] = deque()

    def submit(self, path: Path, write: Write) -> None:
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= self.limit):
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(write_atomically, path, write))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self.waiting:
                future.result()


# Formats


class ImageFiles:
    """The images of a run, in `folder`/images, block by block; a block is one batch's range of indices."""

    merged: Path | None = None  # one file of all images, beside that folder

    def __init__(self, folder: Path, num_images: int, batch_size: int):
        self.folder, self.batch_size = folder / "images", batch_size
        starts = range(0, num_images, batch_size)
        self.blocks = [range(start, min(start + batch_size, num_images)) for start in starts]

    def names(self, block: range) -> list[str]:
        """The files that exist when the block is done."""
        raise NotImplementedError

    def parts(self, block: range, images: torch.Tensor) -> Iterator[tuple[Path, Write]]:
        """uint8 [B, C, H, W] on the CPU -> the block's files and what writes them."""
        raise NotImplementedError

    def read(self, count: int) -> torch.Tensor:
        """The first images, uint8 [count, C, H, W]; after `finish`."""
        raise NotImplementedError

    def missing(self) -> list[range]:
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [block for block in self.blocks if not present.issuperset(self.names(block))]

    def writes(self, name: str) -> bool:
        """Whether a run makes a file of this name in images/, finished or not."""
        name = name.removesuffix(".tmp")
        digits = re.match("[0-9]+", name)
        block = int(digits[0]) // self.batch_size if digits else len(self.blocks)
        return block < len(self.blocks) and name in self.names(self.blocks[block])

    def finish(self) -> None:
        """Called once, when no block is missing."""


class PngFiles(ImageFiles):
    """000000.png, 000001.png, ..."""

    def names(self, block):
        return [f"{i:06d}.png" for i in block]

    def parts(self, block, images):
        for name, image in zip(self.names(block), images, strict=True):
            yield self.folder / name, lambda file, image=image: to_pil(image).save(file, format="PNG")

    def read(self, count):
        return torch.stack([read_picture(self.folder / name) for name in self.names(range(count))])


class Shards(ImageFiles):
    """One file a block, named by its first and last image: 000000-000255.npz, ..."""

    suffix: str

    def names(self, block):
        return [self.shard(block).name]

    def shard(self, block: range) -> Path:
        return self.folder / f"{block.start:06d}-{block.stop - 1:06d}.{self.suffix}"


class ParquetShards(Shards):
    """Shards with an `image` column, for `datasets.load_dataset("OUT/images")`."""

    suffix = "parquet"

    def parts(self, block, images):
        import datasets  # slow to import, and only needed here

        datasets.disable_progress_bars()

        def write(file: BinaryIO) -> None:
            pictures = {"image": [to_pil(image) for image in images]}
            features = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict(pictures, features=features).to_parquet(file)

        yield self.shard(block), write

    def read(self, count):
        from pyarrow.parquet import read_table

        blocks = [block for block in self.blocks if block.start < count]
        rows = [row for block in blocks for row in read_table(self.shard(block))["image"].to_pylist()]
        return torch.stack([read_picture(io.BytesIO(row["bytes"])) for row in rows[:count]])


class NpzShards(Shards):
    """Shards that end up in `folder`/images.npz: key arr_0, uint8 [N, H, W, C], as ADM's evaluator reads it."""

    suffix = "npz"

    def __init__(self, folder, num_images, batch_size):
        super().__init__(folder, num_images, batch_size)
        self.merged = folder / "images.npz"

    def parts(self, block, images):
        array = images.permute(0, 2, 3, 1).contiguous().numpy()
        yield self.shard(block), lambda file: np.savez(file, array)

    def read(self, count):
        return torch.from_numpy(read_npz(self.merged)[:count]).permute(0, 3, 1, 2)

    def missing(self):
        merged = self.num_merged()
        return [block for block in super().missing() if block.stop > merged]

    def finish(self):
        """Copy the shards into images.npz, after the whole blocks it already has, and delete them."""
        merged = self.num_merged()
        if merged < self.blocks[-1].stop:
            write_atomically(self.merged, lambda file: self.merge(file, merged))
        for block in self.blocks:
            self.shard(block).unlink(missing_ok=True)
        if not os.listdir(self.folder) and not self.folder.is_symlink():
            self.folder.rmdir()

    def merge(self, file: BinaryIO, merged: int) -> None:
        """What np.savez would write, one block at a time."""
        old = read_npz(self.merged) if merged else None
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as out:
            for block in self.blocks:
                whole = block.stop <= merged
                rows = old[block.start : block.stop] if whole else read_npz(self.shard(block))
                if block.start == 0:
                    shape = (self.blocks[-1].stop, *rows.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(out, header)
                out.write(rows.tobytes())

    def num_merged(self) -> int:
        """How many images images.npz holds, from its header; 0 when there is none."""
        if not self.merged.exists():
            return 0
        with zipfile.ZipFile(self.merged) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            return np.lib.format.read_array_header_1_0(file)[0][0]


FORMATS = {"png": PngFiles, "npz": NpzShards, "parquet": ParquetShards}


def read_npz(path: Path) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays["arr_0"]


def read_picture(file: Path | BinaryIO) -> torch.Tensor:
    """A file with a grey or RGB picture -> uint8 [1 or 3, H, W]."""
    array = np.array(Image.open(file))
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
