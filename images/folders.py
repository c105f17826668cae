"""List a local folder: every image in it, and a count of everything that is not one.

`datasets` drops files by their names, without a word: what a folder holds is decided here, and said.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .file_types import ARCHIVES, DATA_FILES, METADATA_FILES, extension_of, has_image_name, is_image_file
from .records import GRID, RECORD, TRAINING_RECORD, check_finished, images_of, read_record


@dataclass
class Listing:
    """What is in a folder; all paths are relative to it, with "/" between their parts.

    Attributes:
        images: sorted as strings, which is the order that `datasets` has them in.
        folders: all the folders that were entered.
        metadata: files called metadata.csv, .jsonl or .parquet.
        data_files: parquet and arrow files, which may hold images of their own.
        left_out: {why: how many}.
        notes: what a person should be told of it.
    """

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    data_files: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def list_folder(folder: Path) -> Listing:
    """List a folder and all below, following links but into no circle.

    Opens no file whose extension says what it is, so that a million images take seconds.

    Raises:
        ValueError: a folder cannot be read, or holds the images of a run of generate.py that has not finished.
    """
    listing = Listing()
    _walk(os.fspath(folder), "", (), listing)
    listing.images.sort()
    _check_names(listing.images)
    return listing


def _walk(folder: str, prefix: str, ancestors: tuple, listing: Listing) -> None:
    """Add what `folder` holds to the listing. `prefix` is its path in the listing; `ancestors` are those around it."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"--dataset_name: folder {folder} cannot be read: {error.strerror or error}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        listing.left_out["link to a folder around it"] += 1
        return
    names = {entry.name for entry in entries}
    if prefix and TRAINING_RECORD in names:
        listing.left_out["folder of a training run"] += 1
        listing.notes.append(f"{prefix[:-1]} is the folder of a training run ({TRAINING_RECORD}), and is left out")
        return
    is_generated = RECORD in names and _check_generated(Path(folder), prefix, listing)
    listing.folders.append(prefix[:-1])
    for entry in entries:
        if is_generated and entry.name == GRID:
            listing.left_out[f"{GRID} of generate.py"] += 1
        elif _is_folder(entry) and not entry.name.startswith("."):
            _walk(entry.path, f"{prefix}{entry.name}/", (*ancestors, identity), listing)
        else:
            _add_file(entry, prefix + entry.name, listing)


def _check_generated(folder: Path, prefix: str, listing: Listing) -> bool:
    """Whether generate.py wrote the folder. It must have finished; an .npz of its images is left out, and said."""
    record = read_record(folder)
    if record is None:
        return False
    images = images_of(folder, record)
    if record["status"] != "complete":
        check_finished(folder, record, len(os.listdir(images)) if images.is_dir() else 0)
    if images.suffix == ".npz":
        listing.notes.append(f"the images in {prefix}{images.name} are left out: name that file to use them")
    return True


def _add_file(entry: os.DirEntry, path: str, listing: Listing) -> None:
    """Add what is not a folder, or hidden, to the listing."""
    extension = extension_of(entry.name)
    if entry.name.startswith("."):
        listing.left_out["hidden folder" if _is_folder(entry) else "hidden file"] += 1
    elif _is_broken_link(entry):
        if has_image_name(entry.name):  # a bad image then, not a missing one
            listing.images.append(path)
        else:
            listing.left_out["broken link"] += 1
    elif not entry.is_file():  # a pipe, which would block whoever opened it, or a socket
        listing.left_out["special file"] += 1
    elif entry.name in METADATA_FILES:
        listing.metadata.append(path)
    elif extension in DATA_FILES:
        listing.data_files.append(path)
    elif is_image_file(entry.path):
        listing.images.append(path)
    else:
        listing.left_out[extension or "file without an extension"] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_broken_link(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _check_names(paths: Iterable[str]) -> None:
    """Raise ValueError for a file name that is not UTF-8: neither Arrow nor a record could hold it."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError(f"--dataset_name: the file name {path!a} is not UTF-8: rename the file") from None


def has_only_archives(listing: Listing) -> bool:
    """Whether what was left out for its extension are archives, and nothing else was found."""
    extensions = {reason for reason in listing.left_out if reason.startswith(".")}
    found = listing.images or listing.data_files or listing.metadata
    return not found and bool(extensions) and extensions <= ARCHIVES


def check_output_outside_data(output_dir: str, dataset_name: str, flag: str = "--output_dir") -> None:
    """Raise ValueError if what a run writes would become part of its data. flag: what the folder was called by."""
    data = Path(dataset_name).expanduser()
    if dataset_name == "digits" or not data.is_dir():
        return
    output = Path(output_dir).expanduser().resolve()
    if output.is_relative_to(data.resolve()):
        raise ValueError(
            f"{flag} {output_dir}: is inside --dataset_name {dataset_name}, so that what the run writes there would "
            "become data; choose a folder outside"
        )
