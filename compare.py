"""Several methods, the same wall-clock time each: one table and two plots.

    python compare.py --methods ddpm min_snr p2 speed adaptive --seeds 0 1 2 --max_train_seconds 600 \\
        --output_dir runs/comparison --config configs/cifar10.yaml --eval_num_images 10000

Each run is one of train_adaptive_ddpm.py, to which all other flags go; `eval_*` say how it is scored. Its time is cut
into slices: all runs train their first, then all their second, and so on, so that a drift of the machine's speed hits
all alike. After each slice the averaged weights are scored, outside the clock. A comparison that was killed goes on
where it stopped when the same command is given again. With --join, runs of comparisons made elsewhere with the same
settings (other seeds, on a machine of the same kind) are reported together with this folder's.
"""

import ctypes
import gc
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import HfArgumentParser

from comparison.options import ComparisonOptions
from comparison.plots import plot_densities, plot_scores
from comparison.results import RESULTS_FILE, joined_results, open_results, parts_of_methods
from comparison.summary import summarise, table
from images import check_output_outside_data
from pipelines import load_pipeline
from progress import progress_bar
from recipes import expand_home, one_line_errors
from train_adaptive_ddpm import command_line
from training.data import open_training_data
from training.evaluation import Evaluator
from training.folder_lock import folder_lock
from training.log import read_metrics
from training.options import TrainingOptions
from training.output import SUMMARY_FILE
from training.plan import plan_run
from training.saving import read_json, replace_file, write_json

# Options of training that a comparison decides
OF_EACH_RUN = (
    "seed",
    "method",
    "output_dir",
    "max_train_seconds",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "dry_run",
)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TRAINING_SCRIPT = Path(__file__).parent / "train_adaptive_ddpm.py"


def main(argv: Sequence[str]) -> None:
    parser = HfArgumentParser(ComparisonOptions, allow_abbrev=False)
    namespace, training_flags = parser.parse_known_args(argv)
    with one_line_errors(ValueError, OSError, FloatingPointError):
        options = ComparisonOptions(**{name: expand_home(value) for name, value in vars(namespace).items()})
        training_options = command_line(training_flags)  # a bad flag is found out here
        check_training_flags(options, training_flags)
        check_output_outside_data(options.output_dir, training_options.dataset_name)
        plan_run(training_options)
        with folder_lock(options.output_dir):
            try:
                compare(options, training_options, training_flags)
            except KeyboardInterrupt:
                raise OSError(f"interrupted; the same command goes on from what is in {options.output_dir}") from None


def check_training_flags(options: ComparisonOptions, training_flags: list[str]) -> None:
    """Refuse flags of training that each run has its own of, and samplers' settings that cannot be used.

    Raises:
        ValueError: naming the flag.
    """
    # "--seed", "--seed=1" and the assignment "seed=1" alike
    words = [flag.lstrip("-").partition("=")[0] for flag in training_flags if flag.startswith("--") or "=" in flag]
    names = {word.replace("-", "_") for word in words}
    for name in OF_EACH_RUN:
        if name in names:
            raise ValueError(
                f"--{name}: is not for a comparison, which gives each run its own, by --methods and --seeds"
            )
    for method, settings in options.sampler_options.items():
        if not isinstance(settings, dict):
            raise ValueError(f"--sampler_options {method} {settings!r}: must be a JSON object of settings")
        flags = ["--method", method, "--timestep_sampler_options", json.dumps(settings)]
        plan_run(command_line([*training_flags, *flags]))


def compare(options: ComparisonOptions, training_options: TrainingOptions, training_flags: list[str]) -> None:
    """Train and score what is left to do in a folder that this process holds, and report all."""
    folder = Path(options.output_dir)
    results = open_results(folder, options, training_flags, parts_of_methods(training_options))
    joined = [joined_results(other, results) for other in options.join]
    dataset, _ = open_training_data(training_options)
    print(dataset.describe())
    evaluator = Evaluator(
        training_options, dataset, PartialState(), training_options.seed, training_options.train_batch_size
    )
    results |= {"score": evaluator.name, "data": dataset.contents()}
    write_json(results, folder / RESULTS_FILE)  # which makes the folder one to go on in

    for run in results["runs"].values():
        run.pop("failed", None)  # what failed may have been a full disk: it is tried again
    total = len(options.methods) * len(options.seeds) * options.max_train_seconds
    bar_format = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of training [{remaining}]"
    progress = progress_bar(total=total, unit="s", bar_format=bar_format)
    for method, seed, seconds, new_seconds in slices(options):
        run = results["runs"].setdefault(f"{method}-seed{seed}", {"method": method, "seed": seed, "scores": []})
        progress.set_description(f"{method}, seed {seed}, to {seconds:.0f} s")
        if "failed" not in run and not any(score["budget"] == seconds for score in run["scores"]):
            flags = [*training_flags]
            if sampler_options := options.sampler_options.get(method):
                flags += ["--timestep_sampler_options", json.dumps(sampler_options)]
            train_and_score(run, folder, flags, seconds, evaluator, is_last=seconds == options.max_train_seconds)
            write_json(results, folder / RESULTS_FILE)
        progress.update(new_seconds)
    progress.close()

    for other in joined:
        results["runs"] |= {name: run for name, run in other["runs"].items() if name not in results["runs"]}
        results["command"] += "; " + other["command"]
    if joined:
        write_json(results, folder / "joined.json")
    report(results, folder)


def slices(options: ComparisonOptions) -> Iterator[tuple[str, int, float, float]]:
    """(method, seed, seconds to train up to, seconds of that which are new), in the order in which runs are trained."""
    before = 0.0
    for fraction in options.score_at:
        seconds = fraction * options.max_train_seconds
        for seed, method in itertools.product(options.seeds, options.methods):
            yield method, seed, seconds, seconds - before
        before = seconds


def train_and_score(
    run: dict[str, Any], folder: Path, training_flags: list[str], seconds: float, evaluator: Evaluator, is_last: bool
) -> None:
    """Train a run up to `seconds`, score it, and note both in `run`; or why that failed."""
    run_folder = folder / f"{run['method']}-seed{run['seed']}"
    command = [sys.executable, TRAINING_SCRIPT, *training_flags, "--output_dir", run_folder]
    command += ["--method", run["method"], "--seed", run["seed"], "--max_train_seconds", seconds]
    command += ["--resume_from_checkpoint", "latest"] + ([] if is_last else ["--eval_batch_size", 0])
    with (folder / f"{run_folder.name}.log").open("a") as log:
        words = [str(part) for part in command]
        status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent).returncode
    if status:
        lines = Path(log.name).read_text().splitlines() or [""]
        run["failed"] = f"exit status {status}: {lines[-1]}"
        return
    summary = read_json(run_folder / SUMMARY_FILE)
    if summary["stopped_by"] == "signal":
        raise OSError(f"{run_folder} was stopped by a signal, before {seconds:,.0f} s; the same command goes on")
    pipeline = load_pipeline(str(run_folder))
    run["scores"].append(
        {
            "budget": seconds,
            "seconds": summary["seconds"]["train"],
            "steps": summary["steps"],
            "images": summary["images"],
            "score": evaluator.score(pipeline),
        }
    )
    records = [record for record in read_metrics(run_folder / "metrics.jsonl") if "density" in record]
    for name in ("density", "weight"):
        run[name] = {"early": records[len(records) // 8][name], "late": records[-1][name]}


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends, in whatever way: it would hold its folder against the next
    comparison. Its checkpoints outlive that. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def report(results: dict[str, Any], folder: Path) -> None:
    """Write table.md, scores.png and densities.png."""
    methods = summarise(results)
    text = table(results, methods)
    replace_file(folder / "table.md", lambda path: path.write_text(text))
    replace_file(folder / "scores.png", lambda path: plot_scores(results["score"], methods, path))
    replace_file(folder / "densities.png", lambda path: plot_densities(methods, path))
    print(text)


if __name__ == "__main__":
    gc.freeze()  # all that was imported: looking through it when the process ends would take a second and more
    main(sys.argv[1:])
