"""results.json: what a comparison has found so far, to go on from, and to join with that of others."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from comparison.entrants import OF_EACH_RUN, Entrant
from comparison.options import ComparisonOptions, Ladders
from comparison.runs import stops_left
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
        **({"use_clipped_model_output": True} if "ddim" in options.score_samplers else {}),
        **plain_values(training_options, NO_SETTINGS),
    }


def open_results(folder: Path, settings: dict[str, Any], entrants: dict[str, Entrant]) -> dict[str, Any]:
    """results.json of a comparison that was stopped, or a new one. Says so if another commit, or other versions of the
    libraries, made what is there.

    Raises:
        ValueError: the folder holds another comparison, one on another device, or one whose entrants were others, or
            something else.
    """
    now = {
        "commands": [shlex.join(["python", "compare.py", *sys.argv[1:]])],
        "settings": settings,
        "device": device_name(PartialState().device),
        "versions": [{**library_versions(), "adaptive_timesteps": __version__}],
        "commits": [code_commit()],
        "entrants": {name: {"options": entrant.options, "parts": entrant.parts} for name, entrant in entrants.items()},
        "runs": {},
    }
    path, flag = folder / RESULTS_FILE, f"--output_dir {folder}"
    if path.exists():
        results = read_results(path, "--output_dir")
        check_same(flag, results, now)
        if now["commits"] != results["commits"][-1:]:
            print(f"{flag}: goes on by commit {now['commits'][0]}, after {results['commits'][-1]}", file=sys.stderr)
        add_origin(results, now)
        results["entrants"] |= now["entrants"]
        return results
    if {entry.name for entry in folder.iterdir()} - {LOCK_FILE}:
        raise ValueError(f"{flag}: is not empty, and holds no {RESULTS_FILE} to go on from")
    return now


def read_results(path: Path, flag: str) -> dict[str, Any]:
    """The results in a file of a comparison. Raises ValueError if it is none."""
    results = read_json(path)
    if not {"settings", "device", "runs"} <= results.keys():
        raise ValueError(f"{flag} {path.parent}: its {RESULTS_FILE} is not that of a comparison")
    if not {"entrants", "commands"} <= results.keys():
        raise ValueError(
            f"{flag} {path.parent}: its {RESULTS_FILE} is of an earlier version, and can be neither gone on with nor "
            "joined"
        )
    return results


def open_joined(folders: Sequence[str], results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{folder: results.json} of other comparisons, whose entrants by the same name are the same in all of them.

    Raises:
        ValueError: of `joined_results`.
    """
    others, known = {}, results["entrants"]
    for folder in folders:
        others[folder] = joined_results(folder, {**results, "entrants": known})
        known = {**entrants_with_runs(others[folder]), **known}
    return others


def joined_results(folder: str, results: dict[str, Any]) -> dict[str, Any]:
    """results.json of another comparison. Says so if another commit, or other versions of the libraries, made it.

    Raises:
        ValueError: it has other settings, ran on another device, or has other entrants by the same names.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        raise ValueError(f"--join {folder}: holds no {RESULTS_FILE}")
    other = read_results(path, "--join")
    check_same(f"--join {folder}", other, results)
    if other["commits"] != results["commits"]:
        commits = (", ".join(map(str, each["commits"])) for each in (other, results))
        print("--join {}: its runs were made by commit {} (here {})".format(folder, *commits), file=sys.stderr)
    return other


def join(results: dict[str, Any], others: dict[str, dict[str, Any]]) -> None:
    """Add the runs of others. Of a run that several have, the one that has come farthest is taken; of two as far, the
    first. Says so.

    Args:
        others: {folder: its results}.
    """
    ladders = results["settings"]["ladders"]
    for folder, other in others.items():
        for name, run in other["runs"].items():
            mine = results["runs"].get(name, run)
            results["runs"][name] = taken = max(mine, run, key=lambda each: progress_of(each, ladders))
            if mine is not run and mine["scores"] and run["scores"]:
                which = "that one" if taken is run else "the other"
                print(f"--join {folder}: has another run of {name}; {which} is reported", file=sys.stderr)
        results["entrants"] = {**entrants_with_runs(other), **results["entrants"]}
        add_origin(results, other)


def progress_of(run: dict[str, Any], ladders: Ladders) -> tuple[int, bool]:
    """By what one of two runs is preferred: how far it has come, and that it has not failed there."""
    return -stops_left(run, ladders), "failed" not in run


def add_origin(results: dict[str, Any], other: dict[str, Any]) -> None:
    """Note by which commands, commits and versions of the libraries the runs of `other` were made."""
    for kind in ("commands", "commits", "versions"):
        results[kind] += [origin for origin in other[kind] if origin not in results[kind]]


def entrants_with_runs(results: dict[str, Any]) -> dict[str, Any]:
    """{name: {"options", "parts"}} of those that have begun a run."""
    return {run["entrant"]: results["entrants"][run["entrant"]] for run in results["runs"].values()}


def check_same(flag: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse results that cannot stand in one table with those of now; say so if other versions of the libraries made
    them.

    Args:
        flag: whose folder the results are from.

    Raises:
        ValueError: they have other settings, ran on another device, or have other entrants by the same names.
    """
    check_same_settings(flag, then, now["settings"])
    if then["device"] != now["device"]:
        raise ValueError(f"{flag}: its device is {then['device']}, not {now['device']}")
    check_same_entrants(flag, then, now["entrants"])
    here = now["versions"][-1]
    for versions in then["versions"]:
        differ = [name for name in {**versions, **here} if versions.get(name) != here.get(name)]
        if differ:
            others = ", ".join(f"{name} {versions.get(name)} (here {here.get(name)})" for name in differ)
            print(f"{flag}: its runs were made by other versions: {others}", file=sys.stderr)


def check_same_settings(flag: str, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse results of other settings; an option that an earlier version did not know had its default there.

    Args:
        flag: whose folder the results are from.

    Raises:
        ValueError: naming the setting.
    """
    # Earlier versions had DDIM's steps along the network's own epsilon
    defaults = {"use_clipped_model_output": False, **plain_values(TrainingOptions(), NO_SETTINGS)}
    for name, now in settings.items():
        then = results["settings"].get(name, defaults.get(name, now))
        if then != now:
            of_flags = " (--max_train_seconds, --score_at, --score_at_images)" if name == "ladders" else ""
            raise ValueError(f"{flag}: has other settings: its {name}{of_flags} is {then}, not {now}")


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
        extractor: {"name", "weights_sha256", ...} now.

    Raises:
        ValueError: naming both.
    """
    then = results.get("feature_extractor", extractor)
    if then["weights_sha256"] != extractor["weights_sha256"]:
        names = ("{name}, SHA-256 {weights_sha256}".format(**each) for each in (then, extractor))
        raise ValueError("{}: its feature extractor is {}, not {}".format(flag, *names))
