"""results.json: what a comparison has found so far, to go on from, and to join with that of others."""

import shlex
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from comparison.entrants import OF_EACH_RUN, Entrant
from comparison.options import ComparisonOptions
from recipes import plain_values
from samplers import __version__
from training.folder_lock import LOCK_FILE
from training.machine import code_commit, device_name, library_versions
from training.options import TrainingOptions
from training.saving import read_json

RESULTS_FILE = "results.json"
# Of training, and no settings of a comparison; the extractor is known by its weights, wherever they are
NO_SETTINGS = (*OF_EACH_RUN, "config", "eval_feature_extractor", "eval_feature_extractor_weights", "hub_token")


def settings_of(options: ComparisonOptions, training_options: TrainingOptions) -> dict[str, Any]:
    """What all runs of a comparison have in common, as JSON has it."""
    return {
        "ladders": options.ladders,
        "score_samplers": options.score_samplers,
        **plain_values(training_options, NO_SETTINGS),
    }


def open_results(folder: Path, settings: dict[str, Any], entrants: dict[str, Entrant]) -> dict[str, Any]:
    """results.json of a comparison that was stopped, or a new one.

    Raises:
        ValueError: the folder holds another comparison, or one whose entrants were others, or something else.
    """
    described = {name: {"options": entrant.options, "parts": entrant.parts} for name, entrant in entrants.items()}
    commit, path = code_commit(), folder / RESULTS_FILE
    if path.exists():
        results = read_results(path, "--output_dir")
        check_same_settings(f"--output_dir {folder}", results, settings)
        check_same_entrants(f"--output_dir {folder}", results, described)
        if commit != results["commits"][-1]:
            print(f"--output_dir {folder}: goes on by commit {commit}, after {results['commits'][-1]}", file=sys.stderr)
            results["commits"].append(commit)
        results["entrants"] |= described
        return results
    if {entry.name for entry in folder.iterdir()} - {LOCK_FILE}:
        raise ValueError(f"--output_dir {folder}: is not empty, and holds no {RESULTS_FILE} to go on from")
    return {
        "command": shlex.join(["python", "compare.py", *sys.argv[1:]]),
        "settings": settings,
        "device": device_name(PartialState().device),
        "versions": {**library_versions(), "adaptive_timesteps": __version__},
        "commits": [commit],
        "entrants": described,
        "runs": {},
    }


def read_results(path: Path, flag: str) -> dict[str, Any]:
    """The results in a file of a comparison. Raises ValueError if it is none."""
    results = read_json(path)
    if not {"settings", "device", "runs", "command"} <= results.keys():
        raise ValueError(f"{flag} {path.parent}: its {RESULTS_FILE} is not that of a comparison")
    if "entrants" not in results:
        raise ValueError(
            f"{flag} {path.parent}: its {RESULTS_FILE} is of an earlier version, and can be neither gone on with nor "
            "joined"
        )
    return results


def joined_results(folder: str, results: dict[str, Any]) -> dict[str, Any]:
    """results.json of another comparison. Says so if another commit, or other versions of the libraries, made it.

    Raises:
        ValueError: it has other settings, ran on another device, or has other entrants by the same names.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        raise ValueError(f"--join {folder}: holds no {RESULTS_FILE}")
    other = read_results(path, "--join")
    check_same_settings(f"--join {folder}", other, results["settings"])
    if other["device"] != results["device"]:
        raise ValueError(f"--join {folder}: its device is {other['device']}, not {results['device']}")
    check_same_entrants(f"--join {folder}", other, results["entrants"])
    versions, other_versions = (each.get("versions", {}) for each in (results, other))
    differ = [name for name in {**other_versions, **versions} if versions.get(name) != other_versions.get(name)]
    if differ:
        others = ", ".join(f"{name} {other_versions.get(name)} (here {versions.get(name)})" for name in differ)
        print(f"--join {folder}: its runs were made by other versions: {others}", file=sys.stderr)
    if other["commits"] != results["commits"]:
        commits = (", ".join(map(str, each["commits"])) for each in (other, results))
        print("--join {}: its runs were made by commit {} (here {})".format(folder, *commits), file=sys.stderr)
    return other


def join(results: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Add the runs of others, but those that are in `results` already."""
    for other in others:
        results["runs"] = {**other["runs"], **results["runs"]}
        results["entrants"] = {**other["entrants"], **results["entrants"]}
        results["commits"] += [commit for commit in other["commits"] if commit not in results["commits"]]
        results["command"] += "; " + other["command"]


def check_same_settings(flag: str, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse results of other settings; those that an earlier version did not know are not compared.

    Args:
        flag: whose folder the results are from.

    Raises:
        ValueError: naming the setting.
    """
    for name, then in results["settings"].items():
        if name in settings and then != settings[name]:
            raise ValueError(f"{flag}: has other settings: its {name} is {then}, not {settings[name]}")


def check_same_entrants(flag: str, results: dict[str, Any], entrants: dict[str, Any]) -> None:
    """Refuse results of an entrant that goes by the same name and is another.

    Args:
        flag: whose folder the results are from.
        entrants: {name: {"options", "parts"}} now.

    Raises:
        ValueError: naming the entrant and what is different.
    """
    for entrant in sorted({run["entrant"] for run in results["runs"].values()} & entrants.keys()):
        then, now = results["entrants"][entrant], entrants[entrant]
        for kind, name in then["parts"].items():
            if now["parts"].get(kind) != name:
                raise ValueError(f"{flag}: its {entrant} has the {kind} {name}, not {now['parts'].get(kind)}")
        if then["options"] != now["options"]:
            raise ValueError(f"{flag}: its {entrant} has the options {then['options']}, not {now['options']}")


def check_same_extractor(flag: str, results: dict[str, Any], extractor: dict[str, Any]) -> None:
    """Refuse scores by another feature extractor, as its weights tell; results without scores may have none yet.

    Args:
        flag: whose folder the results are from.
        extractor: {"name", "weights_sha256"} now.

    Raises:
        ValueError: naming both.
    """
    then = results.get("feature_extractor", extractor)
    if then["weights_sha256"] != extractor["weights_sha256"]:
        names = ("{name}, SHA-256 {weights_sha256}".format(**each) for each in (then, extractor))
        raise ValueError("{}: its feature extractor is {}, not {}".format(flag, *names))
