"""Checkpoints that are either whole or not there."""

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .output import OutputDir
from .saving import named_save_errors

MANIFEST = "manifest.json"  # {file: crc32} of everything else in the checkpoint


def save_checkpoint(
    accelerator: Accelerator,
    output: OutputDir,
    step: int,
    process_state: dict[str, Any],
    total_limit: int = 0,
) -> None:
    """Write `checkpoint-{step}` into the output folder: under a temporary name first, renamed when whole.

    Args:
        accelerator: saves what was prepared with it or registered for checkpointing, and random states.
        output: the run's `OutputDir`, on a file system that all processes share.
        process_state: what this process alone knows; `read_process_state` returns it.
        total_limit: checkpoints to keep; older ones are deleted after the new one is in place. 0 for all.
    """
    final = output.folder / f"checkpoint-{step}"
    if not (final / MANIFEST).exists():  # as it does at the end of a run, whose last step had one
        _write_checkpoint(accelerator, output, final, process_state)
    if accelerator.is_main_process and total_limit:
        for _, old in list_checkpoints(output.folder)[:-total_limit]:
            output.delete_under(old.name)
    accelerator.wait_for_everyone()


def _write_checkpoint(accelerator: Accelerator, output: OutputDir, final: Path, process_state: dict[str, Any]) -> None:
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        output.remove_partial_saves()
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with named_save_errors(partial):
        accelerator.save_state(str(partial))
        torch.save(process_state, partial / _process_file(accelerator.process_index))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with named_save_errors(partial):
            checksums = _checksums(partial)
            (partial / MANIFEST).write_text(json.dumps(checksums, indent=1))
            output.add(f"{final.name}/{name}" for name in (MANIFEST, *checksums))
            put_in_place(partial, final)


def save_shared_weights_once(
    networks: list[torch.nn.Module], state_dicts: list[dict[str, torch.Tensor]], folder: str
) -> None:
    """For `accelerator.register_save_state_pre_hook`: of weights that several layers share, the first name is saved.
    accelerate would leave out the others itself, with a warning each time."""
    for network, state_dict in zip(networks, state_dicts, strict=False):  # accelerate saves sharded ones in another way
        first_names = {name for name, _ in network.named_parameters()}
        all_names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        for name in all_names - first_names:
            state_dict.pop(name, None)


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a folder; into one that holds files of others already, file by file, the manifest last."""
    if not final.exists():
        os.replace(partial, final)
        return
    for file in sorted(partial.iterdir(), key=lambda file: file.name == MANIFEST):
        os.replace(file, final / file.name)
    partial.rmdir()


def find_checkpoint(output_dir: Path, wanted: str, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: `wanted` is "latest" or a path. None where there is none yet.

    Args:
        warn: called with a message for each damaged checkpoint that "latest" passes over.

    Raises:
        ValueError: a named checkpoint that is absent or damaged, or only damaged ones.
    """
    if wanted != "latest":
        path = Path(wanted)
        if not path.is_dir() and (Path(output_dir) / wanted).is_dir():
            path = Path(output_dir) / wanted
        if not (path / MANIFEST).is_file():
            known = [str(checkpoint) for _, checkpoint in list_checkpoints(path) or list_checkpoints(output_dir)]
            raise ValueError(
                f"--resume_from_checkpoint {wanted}: is no checkpoint, as it has no {MANIFEST}; must be latest, or the "
                f"folder of one{': ' * bool(known)}{', '.join(known)}"
            )
        if damage := checkpoint_damage(path):
            raise ValueError(f"--resume_from_checkpoint {wanted}: {damage}")
        return path
    checkpoints = list_checkpoints(output_dir)
    for _, path in reversed(checkpoints):
        damage = checkpoint_damage(path)
        if not damage:
            return path
        warn(f"{path} cannot be read and is passed over: {damage}")
    if checkpoints:
        raise ValueError(f"--resume_from_checkpoint latest: no checkpoint in {output_dir} can be read")
    return None


def discard_checkpoints_after(output: OutputDir, step: int) -> list[Path]:
    """Delete the checkpoints of a life that is given up: those after `step`, from where the run goes on; returns them.
    Whatever checkpoint there is then is whole, and of this run.

    Raises:
        ValueError: one is a link; nothing is deleted then.
    """
    given_up = [path for number, path in list_checkpoints(output.folder) if number > step]
    for path in given_up:
        if path.is_symlink():
            raise ValueError(f"{path}: is given up, but is a link, and nothing behind links is deleted; remove it")
    for path in given_up:
        output.delete_under(path.name)
    return given_up


def read_process_state(path: Path, process_index: int) -> dict[str, Any]:
    """What `save_checkpoint` was given as this process's `process_state`.

    With more processes than saved it, the ones beyond take the state of the first.

    Raises:
        ValueError: it cannot be read, or holds code.
    """
    saved = path / _process_file(process_index)
    try:
        state = torch.load(saved if saved.exists() else path / _process_file(0), map_location="cpu", weights_only=True)
        return {**state, "step": int(state["step"]), "images": int(state["images"])}
    except Exception as error:  # torch, pickle and zip have an error each
        raise ValueError(f"--resume_from_checkpoint {path}: {_short(error)}") from error


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Bring what was prepared with accelerate, or registered for checkpointing, to where the checkpoint has it.

    Raises:
        ValueError: the checkpoint is of another network or optimiser, or holds code.
    """
    try:
        for file in path.glob("custom_checkpoint_*.pkl"):  # which accelerate would load with the code in them
            torch.load(file, map_location="meta", weights_only=True)
        accelerator.load_state(str(path))
    except Exception as error:  # torch, safetensors and pickle have an error each
        raise ValueError(f"--resume_from_checkpoint {path}: does not fit this run: {_short(error)}") from error


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """[(step, path)] of the checkpoints in a folder, whole or damaged, oldest first."""
    files = (file for name in (MANIFEST, _process_file(0)) for file in Path(output_dir).glob(f"checkpoint-*/{name}"))
    folders = {file.parent for file in files}
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folders]
    return sorted((int(match[1]), Path(output_dir) / match[0]) for match in found if match)


def checkpoint_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its files are those of its manifest, bit for bit."""
    try:
        expected = json.loads((path / MANIFEST).read_text())
        actual = _checksums(path)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    for file, checksum in expected.items():
        if file not in actual:
            return f"{file} is missing"
        if actual[file] != checksum:
            return f"{file} was changed or cut short"
    return None


def _short(error: Exception) -> str:
    """The gist of an error that may go on for pages."""
    return f"{type(error).__name__}: {error}"[:300]


def _checksums(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(folder)): _crc32(file) for file in files}


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _process_file(process_index: int) -> str:
    return f"process_state_{process_index}.pt"
