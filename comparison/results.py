"""results.json: what a comparison has found so far, to go on from, and to join with that of others."""

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from comparison.options import ComparisonOptions
from training.folder_lock import LOCK_FILE
from training.machine import device_name, library_versions
from training.saving import read_json

RESULTS_FILE = "results.json"


def open_results(folder: Path, options: ComparisonOptions, training_flags: list[str]) -> dict[str, Any]:
    """results.json of a comparison that was killed, or a new one.

    Raises:
        ValueError: the folder holds another comparison, or something else.
    """
    settings = {"max_train_seconds": options.max_train_seconds, "score_at": options.score_at, "flags": training_flags}
    settings["sampler_options"] = options.sampler_options
    path = folder / RESULTS_FILE
    if path.exists():
        results = read_results(path, "--output_dir")
        if results["settings"] != settings:
            raise ValueError(f"--output_dir {folder}: holds a comparison with other settings: {results['settings']}")
        return results
    if {entry.name for entry in folder.iterdir()} - {LOCK_FILE}:
        raise ValueError(f"--output_dir {folder}: is not empty, and holds no {RESULTS_FILE} to go on from")
    return {
        "command": " ".join(["python", "compare.py", *sys.argv[1:]]),
        "settings": settings,
        "device": device_name(PartialState().device),
        "versions": library_versions(),
        "runs": {},
    }


def read_results(path: Path, flag: str) -> dict[str, Any]:
    """The results in a file of a comparison. Raises ValueError if it is none."""
    results = read_json(path)
    if not {"settings", "device", "runs", "command"} <= results.keys():
        raise ValueError(f"{flag} {path.parent}: its {RESULTS_FILE} is not that of a comparison")
    return results


def joined_results(folder: str, results: dict[str, Any]) -> dict[str, Any]:
    """results.json of another comparison. Warns if other versions of the libraries made it.

    Raises:
        ValueError: it has other settings, or ran on another device.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        raise ValueError(f"--join {folder}: holds no {RESULTS_FILE}")
    other = read_results(path, "--join")
    for name in ("settings", "device"):
        if other[name] != results[name]:
            raise ValueError(f"--join {folder}: its {name} is {other[name]}, not {results[name]}")
    versions, other_versions = (each.get("versions", {}) for each in (results, other))
    if differ := {name: version for name, version in other_versions.items() if versions.get(name) != version}:
        others = ", ".join(f"{name} {version} (here {versions.get(name)})" for name, version in differ.items())
        print(f"--join {folder}: its runs were made by other versions: {others}", file=sys.stderr)
    return other
