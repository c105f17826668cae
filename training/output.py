"""The folder a run writes to: nothing in it is overwritten unasked, and nothing is deleted that no run has written."""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from images.records import TRAINING_RECORD as OPTIONS_FILE

from .folder_lock import LOCK_FILE

LIST_FILE = ".written_files"  # marks the folder as that of a run
SUMMARY_FILE = "training_summary.json"
# Options of one start, or secret
NOT_SAVED = ("overwrite_output_dir", "resume_from_checkpoint", "dry_run", "hub_token")

# What a run writes, as far as its names are known beforehand
RESULTS = """training_options.yaml training_summary.json metrics.jsonl timestep_density.png validation_loss.png
    README.md
    samples/final.png samples/step-*.png
    model_index.json pipeline.py scheduler/scheduler_config.json
    unet/config.json unet/diffusion_pytorch_model* transformer/config.json transformer/diffusion_pytorch_model*
    vae/config.json vae/diffusion_pytorch_model* vqvae/config.json vqvae/diffusion_pytorch_model*"""
CHECKPOINTS = """checkpoint-*/manifest.json checkpoint-*/model*.safetensors checkpoint-*/optimizer*.bin
    checkpoint-*/custom_checkpoint_*.pkl checkpoint-*/random_states_*.pkl checkpoint-*/process_state_*.pt
    checkpoint-*/scaler.pt checkpoint-*/pytorch_model*.bin"""
FOLDERS = re.compile(  # as file systems may
    r"unet|transformer|vae|vqvae|scheduler|samples|checkpoint-\d+", re.IGNORECASE
)


class OutputDir:
    """A run's `--output_dir`, with the list of the files that its runs have written.

    A file is put on the list (`path`) before it is written, so that a run killed at any moment leaves no file that is
    not on it. Deleting goes by the list alone: files of others stay, wherever they are, and no link is followed.
    Only the main process writes here.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._written = None

    def __str__(self):
        return str(self.folder)

    @property
    def written(self) -> set[str]:
        """The paths of what runs have written here, relative to the folder; they may be gone by now."""
        if self._written is None:
            self._written = read_list(self.folder)
        return self._written

    @property
    def is_of_a_run(self) -> bool:
        return (self.folder / LIST_FILE).is_file() or (self.folder / OPTIONS_FILE).is_file()

    def path(self, name: str) -> Path:
        """The path of file `name`, to be written next.

        Raises:
            OSError: it is there already, and no run of ours has written it.
        """
        self.add([name])
        return self.folder / name

    def add(self, names: Iterable[str]) -> None:
        """Put files on the list, which are to be written next. Raises OSError as `path` does."""
        new = [name for name in names if name not in self.written]
        for name in new:
            if os.path.lexists(self.folder / name):
                raise FileExistsError(f"{self.folder / name} is not of this run: it is left as it is; move it away")
        if new:
            self._note(new)

    def add_present(self, folder: str, before: set[str]) -> None:
        """Put on the list what has come to be in a sub-folder since `before`, of `present`: logs choose their names."""
        self._note(sorted(self.present(folder) - before - self.written))

    def present(self, folder: str) -> set[str]:
        """The files in a sub-folder now."""
        return {str(path.relative_to(self.folder)) for path in (self.folder / folder).rglob("*") if path.is_file()}

    def delete(self, names: Iterable[str]) -> None:
        """Delete listed files, and then the folders that this has emptied. Others are left, and so are links."""
        names = [name for name in names if name in self.written and not self.is_behind_a_link(name)]
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                (self.folder / name).unlink()
        for folder in sorted({parent for name in names for parent in Path(name).parents}, reverse=True):
            path = self.folder / folder
            if folder.parts and path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def delete_under(self, folder: str) -> None:
        """Delete what runs have written in a sub-folder."""
        self.delete([name for name in self.written if Path(folder) in Path(name).parents])

    def remove_partial_saves(self) -> None:
        """Delete what saves that were killed left behind."""
        for path in self.folder.iterdir():
            if is_partial_save(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        for name in self.written:
            if not self.is_behind_a_link(name):
                with suppress(FileNotFoundError, NotADirectoryError):
                    partial_path(self.folder / name).unlink()

    def delete_results(self) -> None:
        """Delete all that runs have written here; the list, which says so, comes last."""
        self.remove_partial_saves()
        self.delete(set(self.written))
        (self.folder / LIST_FILE).unlink(missing_ok=True)
        self._written = set()

    def is_behind_a_link(self, name: str) -> bool:
        path = self.folder / name
        return any(part.is_symlink() for part in (path, *path.parents) if self.folder in part.parents)

    def foreign(self) -> list[str]:
        """Files of others in places that a run writes to."""
        in_place_of_folders = {
            path.name for path in self.folder.iterdir() if FOLDERS.fullmatch(path.name) and not path.is_dir()
        }
        return sorted((in_place_of_folders | files_by_name(self.folder, f"{RESULTS} {CHECKPOINTS}")) - self.written)

    def _note(self, names: list[str]) -> None:
        path = self.folder / LIST_FILE
        is_new = not path.exists()
        is_torn = not is_new and not path.read_bytes().endswith(b"\n")  # by a disk that was full
        with path.open("a") as file:
            file.write("\n" * is_torn)
            file.writelines(f"{name}\n" for name in ([*sorted(self.written), *names] if is_new else names))
        self.written.update(names)


def read_list(folder: Path) -> set[str]:
    """The paths on the list of a run's folder. Where it is missing, because the run is older than these lists or was
    copied without hidden files: what is there by a run's names, as far as something shows that a run has been here."""
    if (folder / LIST_FILE).is_file():
        return set(filter(is_inside, (folder / LIST_FILE).read_text().split("\n")))
    if (folder / OPTIONS_FILE).is_file():
        return files_by_name(folder, f"{RESULTS} {CHECKPOINTS} logs/adaptive-ddpm/events.out.tfevents.*")
    return {name for name in files_by_name(folder, CHECKPOINTS) if (folder / name).with_name("manifest.json").is_file()}


def files_by_name(folder: Path, patterns: str) -> set[str]:
    """The paths in `folder` of the files that are named by one of the patterns, which white space divides."""
    paths = (path for pattern in patterns.split() for path in folder.glob(pattern) if not path.is_dir())
    return {str(path.relative_to(folder)) for path in paths}


def is_inside(name: str) -> bool:
    """Whether a line of the list, which anybody may have edited, is a path in its folder."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def is_partial_save(name: str) -> bool:
    """Whether it is the name of a folder that holds a checkpoint or a pipeline until it is whole."""
    return re.fullmatch(r"\.checkpoint-\d+\.partial|\.pipeline\.partial", name) is not None


def partial_path(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".partial.{path.name}")


def check_output_dir(output: OutputDir, *, resume: bool, overwrite: bool, checkpoints: bool) -> None:
    """Refuse a folder that a run may not write to. Nothing is changed.

    Args:
        resume, overwrite: what was asked for.
        checkpoints: there are some.

    Raises:
        ValueError: it has contents and neither was asked for, or nothing that was; or files of others are in the way.
    """
    folder = output.folder
    if not set(os.listdir(folder)) - {LOCK_FILE}:
        return
    if overwrite and not output.is_of_a_run:
        raise ValueError(
            f"--overwrite_output_dir: {folder} is not empty, and is not the folder of a run; choose another"
        )
    if not overwrite and not resume:
        raise ValueError(
            f"--output_dir {folder}: is not empty. Choose another, go on with the run in it by "
            "--resume_from_checkpoint latest, or delete its results by --overwrite_output_dir"
        )
    is_unfinished = output.is_of_a_run and not (folder / SUMMARY_FILE).exists()
    if resume and not checkpoints and not is_unfinished:
        raise ValueError(
            f"--output_dir {folder}: is not empty and has no checkpoint to resume from. Choose another, or delete the "
            "results in it by --overwrite_output_dir"
        )
    if foreign := output.foreign():
        raise ValueError(
            f"--output_dir {folder}: {foreign[0]} would be written over, and is not of this folder's runs; move it away"
        )
    links = [name for name in sorted(output.written) if output.is_behind_a_link(name)]
    if overwrite and links:
        raise ValueError(
            f"--overwrite_output_dir: {folder / links[0]} is behind a link, and nothing behind links is deleted; "
            "remove the link"
        )


def check_disk_space(folder: Path, network: torch.nn.Module, vae: torch.nn.Module | None = None) -> None:
    """Refuse to start where not even one checkpoint and the pipeline fit: weights, EMA and two Adam moments, float32.

    Raises:
        ValueError: naming the space needed and the space free.
    """
    needed = 4 * sum(parameter.numel() for parameter in network.parameters()) * (4 + 1)
    needed += 4 * sum(parameter.numel() for parameter in vae.parameters()) if vae else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"--output_dir {folder}: a checkpoint and the pipeline need {needed / 1e6:,.0f} MB, and "
            f"{free / 1e6:,.0f} MB are free"
        )
