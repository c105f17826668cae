"""A race of methods, in equal time or images: a table and two plots. Other flags are train_adaptive_ddpm.py's.

    python compare.py --config configs/races/methods/digits_dit.yaml
    python compare.py --methods ddpm min_snr p2 speed adaptive --seeds 0 1 2 --max_train_seconds 600 \\
        --output_dir runs/comparison --config configs/cifar10.yaml --lr_warmup_steps 500 --eval_num_images 10000

Each run is one of train_adaptive_ddpm.py, to which all other flags go; `eval_*` say how it is scored. --variants
names methods with other options of training, which take part as methods do. A run stops where it is to be scored: at
fractions of its time (--score_at), at numbers of images (--score_at_images), or at both, whichever comes next. All runs
train to their first stop, then all to their second in the opposite order, and so on, so that a steady drift of the
machine's speed hits all nearly alike; of one that comes and goes, the table says how many images each run had by then.
At a stop the averaged weights are scored, outside the clock. A comparison that was killed, or that --stop_after ended,
goes on where it stopped when the same command is given again. With --join, runs of comparisons made elsewhere with the
same settings (other seeds or methods, on a machine of the same kind) are reported together with this folder's.
"""

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from comparison.entrants import Entrant, check_training_flags, plan_entrants
from comparison.options import ComparisonOptions, read_command_line
from comparison.plots import plot_densities, plot_scores
from comparison.results import RESULTS_FILE, check_same_extractor, join, open_joined, open_results, settings_of
from comparison.runs import begin_runs, next_run, stops_left, train_and_score
from comparison.summary import summarise, table
from images import check_output_outside_data
from progress import progress_bar
from recipes import one_line_errors
from train_adaptive_ddpm import command_line
from training.data import open_training_data
from training.evaluation import Evaluator
from training.folder_lock import folder_lock
from training.options import TrainingOptions
from training.plan import plan_run
from training.saving import replace_file, write_json


def main(argv: Sequence[str]) -> None:
    begun = time.monotonic()
    with one_line_errors(ValueError, OSError, FloatingPointError):
        # Whatever cannot be trained is found out here
        options, training_flags = read_command_line(argv)
        check_training_flags(training_flags)
        training_options = command_line(training_flags)
        check_output_outside_data(options.output_dir, training_options.dataset_name)
        plan_run(training_options)
        entrants = plan_entrants(options, training_flags)
        with folder_lock(options.output_dir):
            try:
                compare(options, entrants, training_options, training_flags, begun)
            except KeyboardInterrupt:
                raise OSError(f"interrupted; the same command goes on from what is in {options.output_dir}") from None


def compare(
    options: ComparisonOptions,
    entrants: dict[str, Entrant],
    training_options: TrainingOptions,
    training_flags: list[str],
    begun: float,
) -> None:
    """Train and score what is left to do in a folder that this process holds, and report all.

    Args:
        begun: when this call did, by `time.monotonic`.
    """
    folder = Path(options.output_dir)
    results = open_results(folder, settings_of(options, training_options), entrants)
    others = open_joined(options.join, results)
    dataset, _ = open_training_data(training_options)
    print(dataset.describe())
    evaluator = Evaluator(
        training_options, dataset, PartialState(), training_options.seed, training_options.train_batch_size
    )
    check_same_extractor(f"--output_dir {folder}", results, evaluator.feature_extractor)
    for name, other in others.items():
        check_same_extractor(f"--join {name}", other, evaluator.feature_extractor)
    results |= {"score": evaluator.name, "feature_extractor": evaluator.feature_extractor, "data": dataset.contents()}
    write_json(results, folder / RESULTS_FILE)  # which makes the folder one to go on in

    ladders, runs = options.ladders, begin_runs(results["runs"], options)
    total, left = len(runs) * sum(map(len, ladders.values())), sum(stops_left(run, ladders) for run in runs)
    progress, left_at_first = progress_bar(total=total, initial=total - left, unit="stop"), left
    while (run := next_run(runs, ladders)) is not None:
        is_over = options.stop_after is not None and time.monotonic() - begun > options.stop_after
        if is_over and left < left_at_first:  # a call comes one stop farther, however short its time
            progress.close()
            return print(
                f"{left} of {total} stops are left after --stop_after {options.stop_after:g} s; "
                "the same command goes on"
            )
        progress.set_description(f"{run['entrant']}, seed {run['seed']}")
        train_and_score(run, entrants[run["entrant"]], folder, training_flags, options, evaluator)
        write_json(results, folder / RESULTS_FILE)
        left = sum(stops_left(run, ladders) for run in runs)
        progress.update(total - left - progress.n)
    progress.close()

    if others:
        join(results, others)
        write_json(results, folder / "joined.json")
    report(results, folder)


def report(results: dict[str, Any], folder: Path) -> None:
    """Write table.md, scores.png and densities.png."""
    entrants = summarise(results)
    text = table(results, entrants)
    replace_file(folder / "table.md", lambda path: path.write_text(text))
    replace_file(folder / "scores.png", lambda path: plot_scores(results["score"], entrants, path))
    replace_file(folder / "densities.png", lambda path: plot_densities(entrants, path))
    print(text)


if __name__ == "__main__":
    gc.freeze()  # all that was imported: looking through it when the process ends would take a second and more
    main(sys.argv[1:])
