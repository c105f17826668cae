"""The folders our own scripts write, known by the record in them and not by what their files look like."""

import json
from pathlib import Path

RECORD = "generation.json"  # of generate.py, beside images/ or images.npz
GRID = "grid.png"  # of generate.py: a picture of pictures, not one of the images
TRAINING_RECORD = "training_options.yaml"  # of train_adaptive_ddpm.py; samples/ beside it holds grids


def read_record(folder: Path) -> dict | None:
    """What generate.py has noted of the images in a folder; None in any other folder."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return record if {"status", "num_images", "settings"} <= record.keys() else None
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return None


def images_of(folder: Path, record: dict) -> Path:
    """Where the images are in a folder of generate.py: a folder of PNGs or parquet shards, or an .npz file."""
    return folder / ("images.npz" if record["settings"]["format"] == "npz" else "images")


def check_finished(folder: Path, record: dict, num_images: int) -> None:
    """Raise ValueError unless generate.py has finished, and as many images are there as it noted."""
    if record["status"] != "complete" or num_images != record["num_images"]:
        raise ValueError(
            f"{folder} holds {num_images} of {record['num_images']} images: let generate.py finish, or copy those "
            "wanted to another folder"
        )
