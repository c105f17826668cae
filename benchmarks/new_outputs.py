"""Whether what a script will write is new, so that nothing is written over: asked before the work."""

import os
from pathlib import Path

from images import check_output_outside_data


def check_new_folder(output_dir: str, dataset_name: str) -> None:
    """Raise ValueError, naming `--output_dir`, unless it is a new or an empty folder, outside the data."""
    check_output_outside_data(output_dir, dataset_name)
    folder = Path(output_dir)
    if os.path.lexists(folder) and not (folder.is_dir() and not os.listdir(folder)):
        raise ValueError(f"--output_dir {folder}: must be a new or an empty folder, as nothing is written over")


def check_new_record(output_json: str | None, *other_suffixes: str) -> None:
    """Raise ValueError, naming `--output_json`, unless it is a new .json file in a folder that exists, and there is no
    file of this name and another suffix either. None is no record."""
    if output_json is None:
        return
    record = Path(output_json)
    if record.suffix != ".json" or not record.parent.is_dir():
        raise ValueError(f"--output_json {record}: must be a file name that ends in .json, in a folder that exists")
    for path in (record, *map(record.with_suffix, other_suffixes)):
        if os.path.lexists(path):
            raise ValueError(f"--output_json {record}: {path} is there already, and nothing is written over")
