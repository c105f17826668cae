"""One training in 1, 2 and 4 processes is the same; where one process dies, all end, and resume as if nothing was."""

import functools
import json
import subprocess
import sys

import psutil
import torch
from conftest import REPOSITORY
from harness import (
    RESUME,
    TRAINING,
    Case,
    Failed,
    Starts,
    bound,
    check_same_run,
    metrics_of,
    scaled,
    slow_steps,
    wait_for,
)
from test_training import SMOOTH, distance, weights

NUM_KILLS = 8
BATCH = 16  # of all processes together
END_WITHIN = 60  # seconds, of the others after one was killed
SLOW = 0.05


def cases(drill):
    """Agreement first; then kills of a rank of a run of two and of four."""
    kills = [2 if i % 3 else 4 for i in range(scaled(NUM_KILLS, drill.scale))]
    return [
        *(Case(f"{count} processes match one", bound(match_one, count)) for count in (2, 4)),
        Case("launched by accelerate, one killed", bound(launched_and_killed, drill.references)),
        *(Case(f"{i}: one of {count} killed", bound(one_killed, count)) for i, count in enumerate(kills)),
    ]


def match_one(folder, rng, count):
    """Within rounding, as in test_training.py; the tables of all ranks agree bit for bit."""
    one, many = folder / "one", folder / "many"
    with Starts() as starts:
        starts.train(one, *SMOOTH, "--train_batch_size", BATCH).wait()
        for rank in starts.train_ranks(count, many, *SMOOTH, "--train_batch_size", BATCH // count):
            rank.wait()
    if (apart := distance(weights(many), weights(one))) > 1e-4:
        raise Failed("weights differ by more than rounding", f"{count} processes: {apart:.3g} of their norm")
    states = [torch.load(many / "checkpoint-24" / f"process_state_{rank}.pt") for rank in range(count)]
    for rank, state in enumerate(states[1:], 1):
        for name, table in states[0]["sampler"].items():
            # "pending" holds what each process alone has seen
            if torch.is_tensor(table) and name != "pending" and not torch.equal(table, state["sampler"][name]):
                raise Failed("the ranks' sampler tables differ", f"{name} of rank {rank}")
    losses = [[record["loss"] for record in metrics_of(run / "metrics.jsonl")] for run in (many, one)]
    if len(losses[0]) != len(losses[1]) or not torch.allclose(*map(torch.tensor, losses), rtol=1e-3):
        raise Failed("the logs differ by more than rounding", losses)


def one_killed(folder, rng, count):
    """One rank, at a random step; the whole run is made beside it, as there is none of four to compare with."""
    run, whole = folder / "run", folder / "whole"
    flags = ("--train_batch_size", BATCH // count)
    with Starts() as starts:
        for rank in starts.train_ranks(count, whole, *flags):
            rank.wait()
        ranks = starts.train_ranks(count, run, *flags, tampers={0: functools.partial(slow_steps, seconds=SLOW)})
        begun = run / rng.choice(["training_options.yaml", "checkpoint-6", "checkpoint-12", "checkpoint-18"])
        wait_for(begun.exists, begun.name, ranks[0])
        victim = rng.choice(ranks)
        ranks[0].process.join(rng.uniform(0, 5 * SLOW))
        victim.kill()
        for rank in ranks:
            rank.wait(None, timeout=END_WITHIN)
            if rank is not victim and rank.process.exitcode == 0:
                raise Failed("a rank ended well though another was killed", rank.output)
        for rank in starts.train_ranks(count, run, *flags, *RESUME):
            rank.wait()
    check_same_run(run, whole)


def launched_and_killed(folder, rng, references):
    """As people start it: the launcher and all ranks end, with an exit status that is not 0."""
    run = folder / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    launch += ["--config_file", REPOSITORY / "accelerate_configs" / "cpu.yaml", REPOSITORY / "train_adaptive_ddpm.py"]
    flags = [*TRAINING, "--output_dir", run]
    command = [str(part) for part in [*launch, *flags]]
    with (folder / "launch.log").open("w") as log:
        # So many steps that it cannot end by itself
        launcher = subprocess.Popen([*command, "--max_train_steps", "100000"], stdout=log, stderr=log)
    try:
        wait_for((run / "checkpoint-12").exists, "checkpoint-12")
        ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in p.environ()]
        rng.choice(ranks).kill()
        status = launcher.wait(END_WITHIN)
        _, alive = psutil.wait_procs(ranks, END_WITHIN)
    finally:
        launcher.kill()
    if status == 0 or alive:
        raise Failed("not all ended after one rank was killed", f"launcher: {status}; alive: {alive}")
    records = (run / "metrics.jsonl").read_text().splitlines()
    steps = json.loads(records[-1])["step"]
    with Starts() as starts:
        for rank in starts.train_ranks(2, run, *RESUME, "--max_train_steps", steps + 24):
            rank.wait()
        for rank in starts.train_ranks(2, folder / "whole", "--max_train_steps", steps + 24):
            rank.wait()
    check_same_run(run, folder / "whole")
