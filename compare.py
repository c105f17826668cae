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
import json
import math
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from accelerate import PartialState
from diffusers import DDPMPipeline
from transformers import HfArgumentParser

from images import check_output_outside_data
from progress import progress_bar
from recipes import JsonDict, expand_home, one_line_errors
from samplers import METHODS
from train_adaptive_ddpm import command_line
from training.data import open_training_data
from training.evaluation import Evaluator
from training.folder_lock import LOCK_FILE, folder_lock
from training.log import read_metrics
from training.machine import device_name, library_versions
from training.output import SUMMARY_FILE
from training.plan import plan_run
from training.saving import read_json, replace_file, write_json

matplotlib.use("agg")

COLOURS = plt.get_cmap("tab20").colors  # one for each method
BASELINE = "ddpm"  # speed-ups are over this method, where it takes part
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
RESULTS_FILE = "results.json"
TRAINING_SCRIPT = Path(__file__).parent / "train_adaptive_ddpm.py"


@dataclass
class ComparisonOptions:
    """All other flags are those of the training script."""

    output_dir: str = field(metadata={"help": "Where runs, results.json, the table and the plots go."})
    max_train_seconds: float = field(metadata={"help": "Of training proper, for each run."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Default: all."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Runs of each method."})
    score_at: list[float] = field(
        default_factory=lambda: [0.125, 0.25, 0.5, 1.0], metadata={"help": "Fractions of the time; the last is 1."}
    )
    sampler_options: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "--timestep_sampler_options by method, JSON."}
    )
    join: list[str] = field(default_factory=list, metadata={"help": "Folders of other comparisons to report with it."})

    def __post_init__(self):
        for flag, methods in (("methods", self.methods), ("sampler_options", self.sampler_options)):
            for method in methods:
                if method not in METHODS:
                    raise ValueError(f"--{flag} {method}: must be of {', '.join(METHODS)}")
        if not 0 < self.max_train_seconds < math.inf:
            raise ValueError(f"--max_train_seconds {self.max_train_seconds}: must be in (0, inf)")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"--seeds {seed}: must be in [0, 2**32)")
        for flag in ("methods", "seeds", "score_at"):
            values = getattr(self, flag)
            if len(set(values)) < len(values) or not values:
                raise ValueError(f"--{flag} {' '.join(map(str, values))}: must be given, and each once")
        in_range = all(0 < fraction <= 1 for fraction in self.score_at)  # which NaN is not
        if not in_range or sorted(self.score_at) != self.score_at or self.score_at[-1] != 1:
            raise ValueError(f"--score_at {' '.join(map(str, self.score_at))}: must rise from above 0 to 1")


def main(argv):
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


def check_training_flags(options, training_flags):
    """Refuse flags of training that each run has its own of, and samplers' settings that cannot be used.

    Raises:
        ValueError: naming the flag.
    """
    given = {flag.partition("=")[0].replace("-", "_") for flag in training_flags}
    for name in ("seed", "method", "overwrite_output_dir", "resume_from_checkpoint"):
        if f"__{name}" in given:
            raise ValueError(f"--{name}: is not for a comparison, whose runs have --methods and --seeds, and go on")
    for method, settings in options.sampler_options.items():
        if not isinstance(settings, dict):
            raise ValueError(f"--sampler_options {method} {settings!r}: must be a JSON object of settings")
        flags = ["--method", method, "--timestep_sampler_options", json.dumps(settings)]
        plan_run(command_line([*training_flags, *flags]))


def compare(options, training_options, training_flags):
    """Train and score what is left to do in a folder that this process holds, and report all."""
    folder = Path(options.output_dir)
    results = open_results(folder, options, training_flags)
    joined = [joined_results(other, results) for other in options.join]
    dataset, _ = open_training_data(training_options)
    print(dataset.describe())
    evaluator = Evaluator(
        training_options, dataset, PartialState(), training_options.seed, training_options.train_batch_size
    )
    results |= {"score": evaluator.name, "data": dataset.contents()}
    write_json(results, folder / RESULTS_FILE)  # which makes the folder one to go on in

    runs = [(method, seed) for seed in options.seeds for method in options.methods]
    total = len(runs) * options.max_train_seconds
    progress = progress_bar(
        total=total, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s of training [{remaining}]"
    )
    before = 0.0
    for run in results["runs"].values():
        run.pop("failed", None)  # what failed may have been a full disk: it is tried again
    for fraction in options.score_at:
        seconds = fraction * options.max_train_seconds
        for method, seed in runs:
            run = results["runs"].setdefault(f"{method}-seed{seed}", {"method": method, "seed": seed, "scores": []})
            progress.set_description(f"{method}, seed {seed}, to {seconds:.0f} s")
            if "failed" not in run and not any(score["budget"] == seconds for score in run["scores"]):
                sampler_options = options.sampler_options.get(method)
                flags = [*training_flags]
                if sampler_options:
                    flags += ["--timestep_sampler_options", json.dumps(sampler_options)]
                train_and_score(run, folder, flags, seconds, evaluator, is_last=fraction == 1)
                write_json(results, folder / RESULTS_FILE)
            progress.update(seconds - before)
        before = seconds
    progress.close()
    for other in joined:
        results["runs"] |= {name: run for name, run in other["runs"].items() if name not in results["runs"]}
        results["command"] += "; " + other["command"]
    if joined:
        write_json(results, folder / "joined.json")
    report(results, folder)


def open_results(folder, options, training_flags):
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


def read_results(path, flag):
    """The results in a file of a comparison. Raises ValueError if it is none."""
    results = read_json(path)
    if not {"settings", "device", "runs", "command"} <= results.keys():
        raise ValueError(f"{flag} {path.parent}: its {RESULTS_FILE} is not that of a comparison")
    return results


def joined_results(folder, results):
    """results.json of another comparison.

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
    return other


def train_and_score(run, folder, training_flags, seconds, evaluator, is_last):
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
    pipeline = DDPMPipeline.from_pretrained(run_folder)
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
    run["density"] = {name: records[i]["density"] for name, i in (("early", len(records) // 8), ("late", -1))}
    run["weight"] = {name: records[i]["weight"] for name, i in (("early", len(records) // 8), ("late", -1))}


def end_with_parent():
    """Let the kernel end this process when its parent ends, in whatever way: it would hold its folder against the next
    comparison. Its checkpoints outlive that. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# The report


def report(results, folder):
    """Write table.md, scores.png and densities.png."""
    methods = summarise(results)
    text = table(results, methods)
    replace_file(folder / "table.md", lambda path: path.write_text(text))
    replace_file(folder / "scores.png", lambda path: plot_scores(results, methods, path))
    replace_file(folder / "densities.png", lambda path: plot_densities(methods, path))
    print(text)


def summarise(results):
    """{method: {"times", "means", "spreads", "images_per_second", "speed_up", "runs", "failed"}}."""
    methods = {}
    for run in results["runs"].values():
        methods.setdefault(run["method"], {"runs": [], "failed": []})["failed" if "failed" in run else "runs"].append(
            run
        )
    for summary in methods.values():
        columns = list(zip(*(run["scores"] for run in summary["runs"]), strict=False))
        summary["times"] = [column[0]["budget"] for column in columns]
        summary["means"] = [statistics.mean(score["score"] for score in column) for column in columns]
        summary["spreads"] = [spread([score["score"] for score in column]) for column in columns]
        rates = [run["scores"][-1]["images"] / run["scores"][-1]["seconds"] for run in summary["runs"] if run["scores"]]
        summary["images_per_second"] = statistics.mean(rates) if rates else None
    baseline = methods.get(BASELINE, {}).get("means")
    for summary in methods.values():
        summary["speed_up"] = speed_up(summary, baseline[-1]) if baseline else None
    return methods


def spread(values):
    """Sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def speed_up(summary, target):
    """The whole time over the time at which the mean score first reached `target`, linear between two scores.

    None if it never did; where the first score already did, a lower bound."""
    times, means = summary["times"], summary["means"]
    for i, (time, mean) in enumerate(zip(times, means, strict=True)):
        if mean <= target:
            if i > 0:
                share = (means[i - 1] - target) / (means[i - 1] - mean)
                time = times[i - 1] + share * (time - times[i - 1])
            return times[-1] / time
    return None


def table(results, methods):
    """The results as Markdown."""
    times = max((summary["times"] for summary in methods.values()), key=len)
    name = results["score"].upper()
    header = ["method", *(f"{name} at {time:,.0f} s" for time in times), "speed-up", "images/s", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method, summary in sorted(methods.items(), key=lambda item: (item[1]["means"] or [float("inf")])[-1]):
        cells = [
            f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")
            for mean, deviation in zip(summary["means"], summary["spreads"], strict=True)
        ]
        cells += ["–"] * (len(times) - len(cells))
        ratio, rate = summary["speed_up"], summary["images_per_second"]
        cells += [f"{ratio:.2f}×" if ratio else "–", f"{rate:,.0f}" if rate else "–", str(len(summary["runs"]))]
        cells[-1] += f" ({len(summary['failed'])} failed)" if summary["failed"] else ""
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    failures = [
        f"`{run['method']}`, seed {run['seed']}: {run['failed']}" for s in methods.values() for run in s["failed"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            "Lower is better; mean ± standard deviation over seeds. Speed-up: the time that "
            f"`{BASELINE}` had, over that at which the method's mean score reached its final one.",
            f"Device: {results['device']}. `{results['command']}`",
            *failures,
            "",
        ]
    )


def plot_scores(results, methods, path):
    """Score against training time, a line a method, with the spread over seeds."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set_prop_cycle(color=COLOURS)
    for method, summary in methods.items():
        errors = [deviation or 0 for deviation in summary["spreads"]]
        axis.errorbar(summary["times"], summary["means"], errors, marker="o", capsize=3, label=method, **style(method))
    axis.set(xlabel="seconds of training", ylabel=results["score"].upper(), xscale="log", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def style(method):
    """Our own method stands out."""
    return {"color": "black", "linewidth": 2.5, "zorder": 3} if method == "adaptive" else {}


def plot_densities(methods, path):
    """p_t and the objective p_t * w_t of each method, early and late in its first run."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for axis in axes.flat:
        axis.set_prop_cycle(color=COLOURS)
    for method, summary in methods.items():
        for column, when in enumerate(("early", "late")):
            if summary["runs"]:
                density, weight = (summary["runs"][0][name][when] for name in ("density", "weight"))
                objective = [p * w for p, w in zip(density, weight, strict=True)]
                positions = [(i + 0.5) / len(density) for i in range(len(density))]
                for row, table in enumerate((density, objective)):
                    label = method if (row, column) == (0, 0) else None  # once in the legend
                    relative = [value * len(table) / sum(table) for value in table]
                    axes[row, column].plot(positions, relative, label=label, **style(method))
    for column, when in enumerate(("early", "late")):
        axes[0, column].set(title=f"density $p_t$, {when}", ylim=(0, None))
        axes[1, column].set(title=f"objective $p_t w_t$, {when}", xlabel="$t / T$", ylim=(0, 5))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
