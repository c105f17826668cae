"""Calls of generate.py, and what they leave, read by others' code."""

import io
import json
import sys
from pathlib import Path

import numpy as np
from conftest import forked
from PIL import Image
from pyarrow.parquet import read_table

import generate

FORMATS = ("png", "npz", "parquet")


def flags(saved, folder, **options):
    """The command line; 10 images in blocks of 4 unless told otherwise."""
    options = {"pipeline": saved, "num_images": 10, "batch_size": 4, "num_inference_steps": 4} | options
    line = ["--output_dir", str(folder)]
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        line += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
    return line


def run(saved, folder, **options):
    generate.main(flags(saved, folder, **options))
    return folder


def launch(*line, run=forked):
    """generate.py by two processes on the CPU, as its docstring has it: to the letter by subprocess.run."""
    root = Path(generate.__file__).parent
    launcher = f"--config_file {root}/accelerate_configs/cpu.yaml --num_processes 2 --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), generate.__file__, *line]
    return run(command, capture_output=True, text=True, timeout=120)


def contents(folder):
    """Name -> bytes of all files but the record, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "generation.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def record(folder):
    return json.loads((folder / "generation.json").read_text())


def read_images(folder, fmt):
    """uint8 NHWC, through other readers than generate.py's."""
    if fmt == "npz":
        with np.load(folder / "images.npz") as arrays:
            assert arrays.files in (["arr_0"], ["arr_0", "arr_1"])
            return arrays["arr_0"]
    if fmt == "png":
        pictures = [Image.open(path) for path in sorted((folder / "images").glob("*.png"))]
    else:
        cells = [c for path in sorted((folder / "images").iterdir()) for c in read_table(path)["image"].to_pylist()]
        pictures = [Image.open(io.BytesIO(cell["bytes"])) for cell in cells]
    return np.stack([np.array(picture).reshape(*picture.size[::-1], -1) for picture in pictures])


def read_labels(folder, fmt):
    """The images' classes, in their order, through other readers than generate.py's."""
    if fmt == "npz":
        with np.load(folder / "images.npz") as arrays:
            assert arrays["arr_1"].dtype == np.int64
            return arrays["arr_1"].tolist()
    if fmt == "png":
        rows = [json.loads(line) for line in (folder / "images" / "metadata.jsonl").read_text().splitlines()]
        assert [row["file_name"] for row in rows] == sorted(path.name for path in (folder / "images").glob("*.png"))
        return [row["label"] for row in rows]
    return [c for path in sorted((folder / "images").iterdir()) for c in read_table(path)["label"].to_pylist()]
