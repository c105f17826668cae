"""Saving so that a folder is never half written."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_save_errors(path):
    """Whatever goes wrong while saving (each library has its own error for a full disk) becomes an OSError that names
    the file and the space left."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(Path(path).parent).free
        raise OSError(f"{path} could not be saved ({free / 1e6:,.0f} MB are free): {error}") from error


def write_json(record, path):
    """Write through a temporary file: `path` is whole whenever it exists."""
    partial = Path(path).with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def save_pipeline(pipeline, folder):
    """Save under a temporary name, then put in place; the index, which makes the folder a pipeline, comes last."""
    partial = Path(folder) / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with named_save_errors(partial):
        pipeline.save_pretrained(partial)
    for name in ("unet", "scheduler"):
        shutil.rmtree(Path(folder) / name, ignore_errors=True)
        os.replace(partial / name, Path(folder) / name)
    os.replace(partial / "model_index.json", Path(folder) / "model_index.json")
    shutil.rmtree(partial)
