"""The formats of generated images: PNGs, parquet shards or one .npz, each with the images' classes if they have any.

A format knows which files hold which images, so that a run that was killed can tell what is still missing.
"""

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from generation.labels import ImageLabels
from generation.writing import Write, write_atomically
from pipelines import to_pil


class GeneratedFiles:
    """The images of a run, in `output_dir`/images, block by block; a block is one batch's range of indices.

    Attributes:
        folder: `output_dir`/images.
        merged: one file of all images, beside that folder; None where a format has none.
        blocks: ranges of indices, which together are 0 .. num_images - 1.
    """

    merged: Path | None = None

    def __init__(self, output_dir: Path, num_images: int, batch_size: int, labels: ImageLabels | None = None):
        self.output_dir, self.num_images, self.batch_size, self.labels = output_dir, num_images, batch_size, labels
        self.folder = output_dir / "images"
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
        """The blocks of which a file is not there yet."""
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


class PngFiles(GeneratedFiles):
    """000000.png, 000001.png, ..., and in the end metadata.jsonl with their classes, as `datasets`' imagefolder has
    it."""

    metadata = "metadata.jsonl"

    def names(self, block: range) -> list[str]:
        return [f"{i:06d}.png" for i in block]

    def parts(self, block: range, images: torch.Tensor) -> Iterator[tuple[Path, Write]]:
        for name, image in zip(self.names(block), images, strict=True):
            yield self.folder / name, lambda file, image=image: to_pil(image).save(file, format="PNG")

    def read(self, count: int) -> torch.Tensor:
        return torch.stack([read_picture(self.folder / name) for name in self.names(range(count))])

    def writes(self, name: str) -> bool:
        is_metadata = self.labels is not None and name.removesuffix(".tmp") == self.metadata
        return is_metadata or super().writes(name)

    def finish(self) -> None:
        """Write metadata.jsonl, unless it is there already."""
        if self.labels is None:
            return
        path, content = self.folder / self.metadata, "".join(self.metadata_lines()).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, lambda file: file.write(content))

    def metadata_lines(self) -> Iterator[str]:
        """A JSON object a line, and an image each."""
        numbers = range(self.num_images)
        for name, label in zip(self.names(numbers), self.labels.of(numbers), strict=True):
            yield json.dumps({"file_name": name, "label": label, "label_name": self.labels.names[label]}) + "\n"


class Shards(GeneratedFiles):
    """One file a block, named by its first and last image: 000000-000255.npz, ..."""

    suffix: str

    def names(self, block: range) -> list[str]:
        return [self.shard(block).name]

    def shard(self, block: range) -> Path:
        return self.folder / f"{block.start:06d}-{block.stop - 1:06d}.{self.suffix}"


class ParquetShards(Shards):
    """Shards with a column `image`, and `label` if there are classes, for `datasets.load_dataset("OUT/images")`."""

    suffix = "parquet"

    def parts(self, block: range, images: torch.Tensor) -> Iterator[tuple[Path, Write]]:
        import datasets  # slow to import, and only needed here

        datasets.disable_progress_bars()

        def write(file: BinaryIO) -> None:
            columns = {"image": [to_pil(image) for image in images]}
            features = datasets.Features({"image": datasets.Image()})
            if self.labels is not None:
                columns["label"] = self.labels.of(block)
                features["label"] = datasets.ClassLabel(names=self.labels.names)
            datasets.Dataset.from_dict(columns, features=features).to_parquet(file)

        yield self.shard(block), write

    def read(self, count: int) -> torch.Tensor:
        from pyarrow.parquet import read_table

        blocks = [block for block in self.blocks if block.start < count]
        rows = [row for block in blocks for row in read_table(self.shard(block))["image"].to_pylist()]
        return torch.stack([read_picture(io.BytesIO(row["bytes"])) for row in rows[:count]])


class NpzShards(Shards):
    """Shards that end up in `output_dir`/images.npz, as ADM's evaluator has it: key arr_0, uint8 [N, H, W, C], and
    arr_1, int64 [N], if there are classes."""

    suffix = "npz"

    def __init__(self, output_dir: Path, num_images: int, batch_size: int, labels: ImageLabels | None = None):
        super().__init__(output_dir, num_images, batch_size, labels)
        self.merged = output_dir / "images.npz"

    def parts(self, block: range, images: torch.Tensor) -> Iterator[tuple[Path, Write]]:
        arrays = [images.permute(0, 2, 3, 1).contiguous().numpy(), *self.label_arrays(block)]
        yield self.shard(block), lambda file: np.savez(file, *arrays)

    def label_arrays(self, indices: range) -> list[np.ndarray]:
        """The array of labels, int64; none without classes."""
        return [] if self.labels is None else [np.array(self.labels.of(indices), dtype=np.int64)]

    def read(self, count: int) -> torch.Tensor:
        return torch.from_numpy(read_npz(self.merged)[:count]).permute(0, 3, 1, 2)

    def missing(self) -> list[range]:
        merged = self.num_merged()
        return [block for block in super().missing() if block.stop > merged]

    def finish(self) -> None:
        """Copy the shards into images.npz, after the whole blocks it already has, and delete them."""
        merged = self.num_merged()
        if merged < self.num_images:
            write_atomically(self.merged, lambda file: self.merge(file, merged))
        for block in self.blocks:
            self.shard(block).unlink(missing_ok=True)
        if not os.listdir(self.folder) and not self.folder.is_symlink():
            self.folder.rmdir()

    def merge(self, file: BinaryIO, merged: int) -> None:
        """What np.savez would write, one block at a time."""
        old = read_npz(self.merged) if merged else None
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as out:
                for block in self.blocks:
                    is_merged = block.stop <= merged
                    rows = old[block.start : block.stop] if is_merged else read_npz(self.shard(block))
                    if block.start == 0:
                        shape = (self.num_images, *rows.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(out, header)
                    out.write(rows.tobytes())
            for labels in self.label_arrays(range(self.num_images)):
                with archive.open("arr_1.npy", "w", force_zip64=True) as out:
                    np.lib.format.write_array(out, labels)

    def num_merged(self) -> int:
        """How many images images.npz holds, from its header; 0 when there is none."""
        if not self.merged.exists():
            return 0
        with zipfile.ZipFile(self.merged) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            return np.lib.format.read_array_header_1_0(file)[0][0]


FORMATS = {"png": PngFiles, "npz": NpzShards, "parquet": ParquetShards}


def read_npz(path: Path) -> np.ndarray:
    """uint8 [N, H, W, C]."""
    with np.load(path) as arrays:
        return arrays["arr_0"]


def read_picture(file: Path | BinaryIO) -> torch.Tensor:
    """A file with a grey or RGB picture -> uint8 [1 or 3, H, W]."""
    array = np.array(Image.open(file))
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
