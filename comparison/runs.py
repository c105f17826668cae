"""The runs of a comparison, which take turns: each trains to its next stop, and is scored there."""

import ctypes
import itertools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from comparison.entrants import Entrant, assignments
from comparison.options import ComparisonOptions, Ladders
from pipelines import SCHEDULERS, load_pipeline
from training.evaluation import Evaluator
from training.log import METRICS_FILE, read_metrics
from training.machine import code_commit
from training.output import SUMMARY_FILE
from training.saving import read_json

Run = dict[str, Any]  # {"entrant", "seed", "scores": [...]}, as in results.json
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TRAINING_SCRIPT = Path(__file__).parent.parent / "train_adaptive_ddpm.py"


def begin_runs(runs: dict[str, Run], options: ComparisonOptions) -> list[Run]:
    """The runs that the options ask for, in the order of their turns; those that are not in `runs` yet are added."""
    asked = []
    for seed, entrant in itertools.product(options.seeds, options.entrants):
        run = runs.setdefault(f"{entrant}-seed{seed}", {"entrant": entrant, "seed": seed, "scores": []})
        if failure := run.pop("failed", None):  # which may have been a full disk: it is tried again
            run.setdefault("failed_before", []).append(failure)
        asked.append(run)
    return asked


def next_run(runs: list[Run], ladders: Ladders) -> Run | None:
    """Whose turn it is: of the runs that have not come to their end, the first of those that have had the fewest turns,
    or every second time the last of them: a steady drift of the machine's speed favours none. None if there is none."""
    unfinished = [run for run in runs if "failed" not in run and stops_left(run, ladders)]
    turns = min((len(run["scores"]) for run in unfinished), default=0)
    next_in_turn = [run for run in unfinished if len(run["scores"]) == turns]
    return next_in_turn[-(turns % 2)] if next_in_turn else None


def reached(run: Run, kind: str) -> float:
    """The last stop of that ladder, "seconds" or "images", that a run has come to; 0 before the first."""
    return max((score["reached"].get(kind, 0) for score in run["scores"]), default=0)


def stops_left(run: Run, ladders: Ladders) -> int:
    """How many stops a run has before it."""
    return sum(stop > reached(run, kind) for kind, stops in ladders.items() for stop in stops)


def next_stops(run: Run, ladders: Ladders) -> dict[str, float | None]:
    """{"seconds", "images"} where a run is to stop next, whichever it comes to first; None where it has no such stop
    before it."""
    return {
        kind: next((stop for stop in ladders.get(kind, []) if stop > reached(run, kind)), None)
        for kind in ("seconds", "images")
    }


def stops_passed(run: Run, ladders: Ladders, summary: dict[str, float]) -> dict[str, float]:
    """The last stop of each ladder that a run has come to since its last score, if any.

    Args:
        summary: {"seconds", "images"} that it has trained.
    """
    passed = {
        kind: [stop for stop in stops if reached(run, kind) < stop <= summary[kind]] for kind, stops in ladders.items()
    }
    return {kind: stops[-1] for kind, stops in passed.items() if stops}


def is_at_an_end(passed: dict[str, float], ladders: Ladders) -> bool:
    """Whether one of the stops that a run has `passed` is the last of its ladder."""
    return any(stop == ladders[kind][-1] for kind, stop in passed.items())


def train_and_score(
    run: Run,
    entrant: Entrant,
    folder: Path,
    training_flags: list[str],
    options: ComparisonOptions,
    evaluator: Evaluator,
) -> None:
    """Train a run to its next stop, score it, and note both in `run`; or why that failed."""
    run_folder, ladders, commit = folder / f"{run['entrant']}-seed{run['seed']}", options.ladders, code_commit()
    if failure := train(run, entrant, run_folder, training_flags, ladders):
        run["failed"] = failure
        return
    summary = read_json(run_folder / SUMMARY_FILE)
    if summary["stopped_by"] == "signal":
        raise OSError(f"{run_folder} was stopped by a signal, before its next stop; the same command goes on")
    trained = {"seconds": summary["seconds"]["train"], "steps": summary["steps"], "images": summary["images"]}
    passed = stops_passed(run, ladders, trained)
    samplers = options.score_samplers if is_at_an_end(passed, ladders) else options.score_samplers[:1]
    try:
        scores = {sampler: score(run_folder, sampler, evaluator) for sampler in samplers}
    except FloatingPointError as error:  # weights or images that are not finite
        run["failed"] = str(error)
        return
    run["scores"].append({"reached": passed, **trained, "commit": commit, "scores": scores})
    run |= read_log(run_folder / METRICS_FILE)


def train(run: Run, entrant: Entrant, run_folder: Path, training_flags: list[str], ladders: Ladders) -> str | None:
    """Train a run to its next stop. Returns why that failed; None where it did not."""
    stops = next_stops(run, ladders)
    budget = {
        "max_train_seconds": stops["seconds"],
        "max_train_steps": stops["images"] and int(stops["images"]) // entrant.images_per_step,
        "num_epochs": None,
    }
    command = [sys.executable, TRAINING_SCRIPT, *training_flags, "--output_dir", run_folder, "--seed", run["seed"]]
    command += ["--resume_from_checkpoint", "latest", *assignments({**entrant.options, **budget})]
    command += [] if stops_left(run, ladders) == 1 else ["--eval_batch_size", 0]  # a grid of samples at the end
    with run_folder.with_name(f"{run_folder.name}.log").open("a") as log:
        begin, words = log.tell(), [str(part) for part in command]
        status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent).returncode
    if status:
        text = Path(log.name).read_bytes()[begin:].decode(errors="replace")  # earlier slices wrote what is before
        lines = [line for line in text.splitlines() if line.strip()]
        return f"exit status {status}: {lines[-1] if lines else 'it said nothing'}"
    return None


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends, in whatever way: it would hold its folder against the next
    comparison. Its checkpoints outlive that. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def score(run_folder: Path, sampler: str, evaluator: Evaluator) -> float:
    """The Fréchet distance of images by a run's averaged weights and the chain `sampler`, deterministic if DDIM's.

    Raises:
        FloatingPointError: weights or images are not finite.
    """
    pipeline = load_pipeline(str(run_folder))
    pipeline.scheduler = SCHEDULERS[sampler].from_config(pipeline.scheduler.config)
    return evaluator.score(pipeline)


def read_log(path: Path) -> dict[str, Any]:
    """Of a run's metrics.jsonl, as far as it is logged: density and weight, early and late; and the share of updates
    whose gradient was clipped."""
    records = read_metrics(path)
    found, tables = {}, [record for record in records if "density" in record]
    if tables:
        early, late = tables[len(tables) // 8], tables[-1]
        found = {name: {"early": early[name], "late": late[name]} for name in ("density", "weight")}
    logged = [record for record in records if "grad_norm_clipped" in record]
    begins = [0, *(record["step"] for record in logged)]  # each record is of the updates since the one before
    clipped = [
        (record["grad_norm_clipped"], record["step"] - begin)
        for record, begin in zip(logged, begins, strict=False)
        if record["grad_norm_clipped"] is not None
    ]
    if updates := sum(count for _, count in clipped):
        found["clipped"] = sum(share * count for share, count in clipped) / updates
    return found
