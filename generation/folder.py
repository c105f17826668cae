"""The folder that generate.py writes to: what is ours in it, and what must never be written over or deleted.

Ours is what the record of an earlier run names, and nothing else.
"""

import os
from pathlib import Path
from typing import Any

from generation.formats import FORMATS, GeneratedFiles
from generation.labels import recorded_labels
from generation.records import differences, write_record
from generation.writing import write_atomically
from images.records import GRID, RECORD, read_record
from pipelines import make_grid_image
from training.folder_lock import LOCK_FILE


def check_folder(files: GeneratedFiles, *, draws_grid: bool, overwrite: bool) -> None:
    """Refuse a folder with files of others, or at least with such as the run would write over or be taken for ours.

    Args:
        files: those to come.
        draws_grid: whether there will be a grid.
        overwrite: whether foreign files may lie beside ours.

    Raises:
        ValueError: naming the first of them.
    """
    folder = files.output_dir
    names = sorted(set(os.listdir(folder)) - {RECORD + ".tmp", LOCK_FILE}) if folder.is_dir() else []
    if not names:
        return
    if read_record(folder):
        foreign = written_paths(files, draws_grid) - recorded_paths(folder)
    elif overwrite:
        written = ("images", "images.npz", "images.npz.tmp", GRID, f"{GRID}.tmp", RECORD)
        foreign = {folder / name for name in written if name in names}
    else:
        raise ValueError(
            f"--output_dir {folder} is not empty ({names[0]}, ...) and has no {RECORD} of ours: "
            "choose another folder, or give --overwrite_output_dir, which leaves foreign files alone"
        )
    if foreign:
        raise ValueError(
            f"--output_dir {folder} has {min(foreign).relative_to(folder)}, which generate.py did not write "
            f"(by its {RECORD}, if there is one): choose another folder"
        )


def prepare_folder(
    files: GeneratedFiles, settings: dict[str, Any], *, draws_grid: bool, overwrite: bool
) -> list[range]:
    """Store the settings, clear what a killed run left half done, and return the blocks still to sample.

    Args:
        files: those to come; their folder has been checked, and is held.
        settings: of `describe_settings`.
        draws_grid: whether there will be a grid.
        overwrite: whether images made with other settings may be deleted.

    Raises:
        ValueError: there are such, and they may not; or they lie behind a link.
    """
    folder = files.output_dir
    recorded, kept = recorded_paths(folder), written_paths(files, draws_grid)
    if differ := differences(read_record(folder), files.num_images, settings):
        if not overwrite:
            raise ValueError(
                f"--output_dir {folder} holds images made otherwise: {'; '.join(differ)}. "
                "Choose another folder, or give --overwrite_output_dir to delete them"
            )
        if files.folder.is_symlink():
            raise ValueError(f"--overwrite_output_dir: {files.folder} is a link, and what it leads to is not deleted")
        kept = set()
    # The record goes on naming what is deleted until nothing of it is left: a run killed here can be started again
    if doomed := {path for path in recorded if path.suffix == ".tmp" or path not in kept}:
        write_record(folder, status="running")
        for path in doomed:
            path.unlink()
    write_record(folder, status="running", num_images=files.num_images, grid=draws_grid, settings=settings)
    files.folder.mkdir(exist_ok=True)
    return files.missing()


def finish_folder(files: GeneratedFiles, grid_images: int, run: dict[str, Any]) -> None:
    """Merge shards, draw a grid of the first `grid_images`, if any, and mark the folder complete, with `run` noted.

    Where the classes come round twice, each has a column of the grid."""
    files.finish()
    if grid_images > 0:
        count = min(grid_images, files.num_images)
        period = len(files.labels.cycle) if files.labels else 1
        grid = make_grid_image(files.read(count), columns=period if 1 < period <= count // 2 else None)
        write_atomically(files.output_dir / GRID, lambda file: grid.save(file, format="PNG"))
    write_record(files.output_dir, status="complete", **run)


def recorded_paths(folder: Path) -> set[Path]:
    """The files in a folder that its record says are ours; nothing else is ever deleted."""
    if (record := read_record(folder)) is None:
        return set()
    try:
        settings = record["settings"]
        labels = recorded_labels(settings)
        files = FORMATS[settings["format"]](folder, record["num_images"], settings["batch_size"], labels)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RECORD} is broken: {error!r}") from error
    return {path for path in written_paths(files, record.get("grid", True)) if path.is_symlink() or path.is_file()}


def written_paths(files: GeneratedFiles, draws_grid: bool) -> set[Path]:
    """Whatever lies where a run writes its images, and its grid: files, finished or not, and all that is in the way."""
    names = {GRID if draws_grid else None, files.merged and files.merged.name}
    paths = {path for path in files.output_dir.glob("*") if path.name.removesuffix(".tmp") in names}
    if files.folder.is_dir():
        return paths | {path for path in files.folder.glob("*") if files.writes(path.name)}
    return paths | ({files.folder} if os.path.lexists(files.folder) else set())
