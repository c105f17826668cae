"""What a run costs besides its steps: start-up, saving, and what further processes bring.

    python benchmarks/run_costs.py --num_processes 1 2 --output_json run_costs.json -- --config configs/digits.yaml

Runs train_adaptive_ddpm.py by `accelerate launch`, with the flags after `--`, as one and as several CPU processes that
share the batch and the cores equally, in turns; and reads what each says of itself (`training_summary.json`). Start-up
is all of a run's wall-clock time that is neither training nor saving: imports, set-up, and the end.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from timing import interleaved, summary
from tqdm.auto import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from new_outputs import check_new_record

from recipes import one_line_errors
from train_adaptive_ddpm import command_line
from training.machine import device_name, library_versions, this_command
from training.saving import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
FIXED = ["--eval_batch_size", "0", "--logger", "none"]


@dataclass
class RunCostOptions:
    """Options of benchmarks/run_costs.py; the training script's follow after `--`."""

    output_json: str = field(metadata={"help": "New file of the measurements."})
    num_processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Each is run in its turn."})
    steps: int = field(
        default=200, metadata={"help": "Updates of a run, after which it saves a checkpoint and the pipeline."}
    )
    repeats: int = field(default=5, metadata={"help": "Runs of each, after one that is not counted."})


def main(argv):
    split = argv.index("--") if "--" in argv else len(argv)
    (options,) = HfArgumentParser(RunCostOptions).parse_args_into_dataclasses(argv[:split])
    with one_line_errors(ValueError):
        check_new_record(options.output_json)
    flags = argv[split + 1 :]
    batch_size = command_line(flags).train_batch_size
    for processes in options.num_processes:
        if batch_size % processes:
            raise SystemExit(f"--num_processes {processes}: must divide the --train_batch_size, {batch_size}")
    with tqdm(total=(1 + options.repeats) * len(options.num_processes), unit="run") as progress:
        launches = {n: partial(run, n, batch_size, flags, options.steps, progress) for n in options.num_processes}
        runs = interleaved(launches, options.repeats)
    table = {
        str(processes): {key: summary([costs[key] for costs in rounds]) for key in rounds[0]}
        for processes, rounds in runs.items()
    }
    results = {"processes": table, "steps": options.steps, "flags": flags, "cores": os.cpu_count()}
    results |= {"device": device_name(torch.device("cpu")), "versions": library_versions()}
    results["command"] = this_command()
    write_json(results, Path(options.output_json))
    for processes, costs in table.items():
        for key, row in costs.items():
            print(f"{processes} processes, {key:20} {row['median']:9.2f} ({row['min']:.2f} to {row['max']:.2f})")


def run(processes, batch_size, flags, steps, progress):
    """{"images_per_second", "start_up_seconds", "save_seconds"} of one run, a step of the progress bar."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", REPOSITORY / "accelerate_configs" / "cpu.yaml", "--num_processes", processes]
        command += [REPOSITORY / "train_adaptive_ddpm.py", *flags, *FIXED, "--output_dir", f"{folder}/run"]
        command += ["--train_batch_size", batch_size // processes, "--max_train_seconds", "1e9"]
        command += ["--max_train_steps", steps, "--checkpointing_steps", steps]
        env = os.environ | {"OMP_NUM_THREADS": str(max(os.cpu_count() // processes, 1))}
        begun = time.perf_counter()
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
        told = json.loads(Path(folder, "run", "training_summary.json").read_text())
    progress.update()
    spent = told["seconds"]
    return {
        "images_per_second": told["images"] / spent["train"],
        "start_up_seconds": seconds - spent["train"] - spent["save"],
        "save_seconds": spent["save"],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
