"""Two sources of images in, metrics.json out: FID, KID, Inception Score, precision and recall.

python evaluate.py --input1 samples --input2 uoft-cs/cifar10 --output_dir scores
python evaluate.py --input1 samples --input2 uoft-cs/cifar10 --output_dir scores-dinov2 \\
    --feature_extractor facebook/dinov2-large

The numbers are torch-fidelity's, with its Inception weights and its settings: they can be compared with published
ones of the same data set, number of images and metric. With any other feature extractor or weights the Fréchet and
kernel distances are called FD and KD: never compare them with an FID or a KID. Precision and recall (Kynkäänniemi et
al. 2019) look at the same features as the other metrics, as in ADM's evaluator; the paper's own are of VGG-16.

--input1 is the generated set, --input2 the reference; its features are cached under a hash of its pixels, so
that they are extracted once, and anew when anything about it or the extractor has changed.
"""

import gc
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from recipes import one_line_errors, parse_options, plain_values
from scoring.checks import check_counts, check_rank, check_sizes
from scoring.feature_extractors import load_extractor
from scoring.fidelity import calculate
from scoring.inputs import describe_input, open_input, read_input, wanted_count
from scoring.options import RESULT_FILE, EvaluationOptions
from scoring.report import describe_machine, print_inputs, print_table
from training.folder_lock import folder_lock
from training.saving import read_json, write_json


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(EvaluationOptions, argv)
    with one_line_errors(ValueError, OSError), folder_lock(options.output_dir):
        evaluate(options, argv)


def evaluate(options: EvaluationOptions, argv: Sequence[str]) -> None:
    """Score the two inputs, and write the result into a folder that this process holds."""
    start = time.perf_counter()
    # Refuse what cannot work before anything takes long
    result_path = check_result(options)
    check_cache_dir(options.features_cache_dir)
    inputs = [open_input(options, 1), open_input(options, 2)]
    print_inputs(inputs)
    check_sizes(options, *inputs)
    counts = [wanted_count(options, number, images) for number, images in enumerate(inputs, 1)]
    check_counts(options, *counts)
    extractor = load_extractor(options.feature_extractor, options.feature_extractor_weights)
    check_rank(options, extractor, *counts)
    if options.features_cache_dir is not None:
        make_cache_dir(Path(options.features_cache_dir))

    images1 = read_input(options, 1, inputs[0])
    images2 = read_input(options, 2, inputs[1])
    check_counts(options, len(images1), len(images2))  # once more: unreadable ones may have been skipped
    check_rank(options, extractor, len(images1), len(images2))
    read_seconds = time.perf_counter() - start

    values, settings = calculate(images1, images2, extractor, options)

    seconds = {"read": read_seconds, "total": time.perf_counter() - start}
    record = {
        "values": values,
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "options": plain_values(options, leave_out=()),
        "input1": describe_input(options, 1, inputs[0], images1),
        "input2": describe_input(options, 2, inputs[1], images2),
        "feature_extractor": extractor.description,
        "torch_fidelity": settings,
        **describe_machine(options.device),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(record, result_path)
    print_table(record)
    print(f"{result_path} says how to repeat this")


def check_result(options: EvaluationOptions) -> Path:
    """The path of the result to come. Raises ValueError if there is one already that may not be replaced."""
    path = Path(options.output_dir) / RESULT_FILE
    if path.exists() and not options.overwrite_output_dir:
        raise ValueError(f"--output_dir {options.output_dir} has a {RESULT_FILE}: --overwrite_output_dir replaces it")
    if path.exists() and not {"values", "torch_fidelity"} <= read_json(path).keys():
        raise ValueError(f"--overwrite_output_dir: {path} is not one of evaluate.py's; choose another folder")
    return path


def check_cache_dir(name: str | None) -> None:
    """Raise ValueError if --features_cache_dir cannot be made, before anything is."""
    if name is not None and Path(name).exists() and not Path(name).is_dir():
        raise ValueError(f"--features_cache_dir {name} is a file, not a folder")


def make_cache_dir(folder: Path) -> None:
    """Raises ValueError or OSError if nothing can be written there: better now than with the features."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--features_cache_dir {folder}: no permission to write there")


if __name__ == "__main__":
    gc.freeze()  # all that was imported: looking through it when the process ends would take a second and more
    main()
