"""metadata.csv, .jsonl or .parquet: which images of a folder to use, and in which order."""

import csv
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .folders import Listing

COLUMN = "file_name"  # relative to the metadata's own folder


def apply_metadata(root: Path, listing: Listing) -> list[str]:
    """Choose the images that are listed, in the order of their metadata; where there is none, all images.

    A metadata file speaks for its folder and all below. What it does not list is counted in `listing.left_out`.

    Returns:
        Paths relative to `root`.

    Raises:
        ValueError: a metadata file cannot be read, or lists what is no image of the folder.
    """
    listed = {path: names for path in sorted(listing.metadata) if (names := _read(root, path, listing)) is not None}
    chosen = [image for path, names in listed.items() for image in _resolve(root, path, names, listing.images)]
    for image, count in Counter(chosen).items():
        if count > 1:
            listing.notes.append(f"{image} is listed {count} times, and is used as often")
    known, omitted = set(chosen), Counter()
    for image in listing.images:
        if image not in known:
            metadata = _metadata_of(image, listed)
            if metadata is None:
                chosen.append(image)
            else:
                omitted[metadata] += 1
    for metadata, count in omitted.items():
        images = "1 image is" if count == 1 else f"{count:,} images are"
        listing.notes.append(f"{images} not in {metadata}, and left out")
        listing.left_out[f"image not in {metadata}"] += count
    return chosen


def _metadata_of(image: str, metadata_files: Iterable[str]) -> str | None:
    """The metadata file nearest above an image."""
    above = [path for path in metadata_files if image.startswith(path[: -len(posixpath.basename(path))])]
    return max(above, key=len, default=None)


def _read(root: Path, path: str, listing: Listing) -> list[str] | None:
    """The file names that a metadata file lists; None, and a note, if it has no column of them."""
    others = [other for other in listing.metadata if posixpath.dirname(other) == posixpath.dirname(path)]
    if len(others) > 1:
        raise ValueError(f"--dataset_name {root}: has {' and '.join(others)}: keep one of them")
    try:
        names = READERS[os.path.splitext(path)[1]](root / path)
    except Exception as error:  # of csv, JSON, Arrow, or the file system
        reason = " ".join(str(error).split())
        raise ValueError(f"--dataset_name {root}: {path} cannot be read: {type(error).__name__}: {reason}") from error
    if names is None:
        listing.notes.append(f"{path} has no column {COLUMN}, and is not used")
        listing.left_out[os.path.splitext(path)[1]] += 1
    return names


def _resolve(root: Path, metadata: str, names: list[str], images: list[str]) -> list[str]:
    """File names in a metadata file -> paths of the listing."""
    known = set(images)
    folder = posixpath.dirname(metadata)
    paths = [posixpath.normpath(posixpath.join(folder, str(name or ""))) for name in names]
    for name, path in zip(names, paths, strict=True):
        if path not in known:
            why = "is not an image in that folder" if name and (root / path).exists() else "is not there"
            raise ValueError(f"--dataset_name {root}: {metadata} lists {name!r}, which {why}")
    return paths


def _read_csv(path: Path) -> list[str] | None:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        return [row[COLUMN] for row in rows] if COLUMN in (rows.fieldnames or ()) else None


def _read_jsonl(path: Path) -> list[str] | None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return [row.get(COLUMN) for row in rows] if any(COLUMN in row for row in rows) else None


def _read_parquet(path: Path) -> list[str] | None:
    from pyarrow import parquet

    if COLUMN not in parquet.read_schema(path).names:
        return None
    return parquet.read_table(path, columns=[COLUMN])[COLUMN].to_pylist()


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
