"""Saving so that a folder is never half written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from pipelines.files import named_save_errors, write_and_rename

from .output import OutputDir, partial_path


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, of the same kind, then put it in place: `path` is always whole."""
    write_and_rename(path, partial_path(path), write)


def write_json(record: dict, path: Path) -> None:
    """Write an object as JSON, through a temporary file."""
    text = json.dumps(record, indent=1) + "\n"
    replace_file(path, lambda partial: partial.write_text(text))


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: it holds none; naming the file.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds no JSON object")
    return content


def save_pipeline(pipeline: DiffusionPipeline, output: OutputDir) -> None:
    """Save under a temporary name, then put in place file by file; the index, which makes the folder a pipeline, comes
    last. Files of an earlier save that this one has not (more shards, say) are deleted."""
    partial = output.folder / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with named_save_errors(partial):
        pipeline.save_pretrained(partial)
        files = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
        files.sort(key="model_index.json".__eq__)
        output.add(files)
        for name in files:
            (output.folder / name).parent.mkdir(exist_ok=True)
            os.replace(partial / name, output.folder / name)
    parts = {Path(name).parts[0] for name in files if "/" in name}
    output.delete(name for name in output.written if Path(name).parts[0] in parts and name not in files)
    shutil.rmtree(partial)
