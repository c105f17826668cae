"""results.json: what a comparison has found so far, to go on from, and to join with that of others."""

import shlex
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from comparison.options import ComparisonOptions
from samplers import METHODS, __version__, resolve_method
from training.folder_lock import LOCK_FILE
from training.machine import device_name, library_versions
from training.methods import method_parts
from training.options import MethodOptions
from training.saving import read_json

RESULTS_FILE = "results.json"
Parts = dict[str, dict[str, str]]  # {method: {"timestep_sampler": name, "loss_weighting": name, ...}}


def parts_of_methods(options: MethodOptions) -> Parts:
    """What every method is made of now, with these options of training."""
    return {method: resolve_method(method, **method_parts(options))._asdict() for method in METHODS}


def open_results(folder: Path, options: ComparisonOptions, training_flags: list[str], parts: Parts) -> dict[str, Any]:
    """results.json of a comparison that was killed, or a new one.

    Args:
        parts: of `parts_of_methods`.

    Raises:
        ValueError: the folder holds another comparison, or one whose methods were others, or something else.
    """
    settings = {"max_train_seconds": options.max_train_seconds, "score_at": options.score_at, "flags": training_flags}
    settings["sampler_options"] = options.sampler_options
    path = folder / RESULTS_FILE
    if path.exists():
        results = read_results(path, "--output_dir")
        if results["settings"] != settings:
            raise ValueError(f"--output_dir {folder}: holds a comparison with other settings: {results['settings']}")
        check_same_methods(f"--output_dir {folder}", results, parts)
        return results
    if {entry.name for entry in folder.iterdir()} - {LOCK_FILE}:
        raise ValueError(f"--output_dir {folder}: is not empty, and holds no {RESULTS_FILE} to go on from")
    return {
        "command": shlex.join(["python", "compare.py", *sys.argv[1:]]),
        "settings": settings,
        "device": device_name(PartialState().device),
        "versions": {**library_versions(), "adaptive_timesteps": __version__},
        "parts": parts,
        "runs": {},
    }


def read_results(path: Path, flag: str) -> dict[str, Any]:
    """The results in a file of a comparison. Raises ValueError if it is none."""
    results = read_json(path)
    if not {"settings", "device", "runs", "command"} <= results.keys():
        raise ValueError(f"{flag} {path.parent}: its {RESULTS_FILE} is not that of a comparison")
    return results


def joined_results(folder: str, results: dict[str, Any]) -> dict[str, Any]:
    """results.json of another comparison. Says so if other versions of the libraries made it, or if one of the two is
    of an earlier version, which did not note what its methods are made of.

    Raises:
        ValueError: it has other settings, ran on another device, or its methods are made of other parts.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        raise ValueError(f"--join {folder}: holds no {RESULTS_FILE}")
    other = read_results(path, "--join")
    for name in ("settings", "device"):
        if other[name] != results[name]:
            raise ValueError(f"--join {folder}: its {name} is {other[name]}, not {results[name]}")
    if "parts" in results and "parts" in other:
        check_same_methods(f"--join {folder}", other, results["parts"])
    else:
        print(f"--join {folder}: it is not known whether the methods are made of the same parts", file=sys.stderr)
    versions, other_versions = (each.get("versions", {}) for each in (results, other))
    differ = [name for name in {**other_versions, **versions} if versions.get(name) != other_versions.get(name)]
    if differ:
        others = ", ".join(f"{name} {other_versions.get(name)} (here {versions.get(name)})" for name in differ)
        print(f"--join {folder}: its runs were made by other versions: {others}", file=sys.stderr)
    return other


def check_same_methods(flag: str, results: dict[str, Any], parts: Parts) -> None:
    """Refuse results of a method that goes by the same name and is made of other parts.

    Args:
        flag: whose folder the results are from.
        parts: of the methods now.

    Raises:
        ValueError: naming the method and the part.
    """
    for method in sorted({run["method"] for run in results["runs"].values()}):
        then, now = results.get("parts", parts).get(method, {}), parts.get(method, {})
        for kind, name in then.items():
            if now.get(kind) != name:
                raise ValueError(f"{flag}: its {method} has the {kind} {name}, not {now.get(kind)}")
