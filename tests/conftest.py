"""Training runs in processes of their own: forked from a server that has imported the script once."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it gives
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reached for the network would fail at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train_adaptive_ddpm"])

TINY = [
    "--dataset_name",
    "digits",
    "--resolution",
    "8",
    "--train_batch_size",
    "8",
    "--max_train_steps",
    "24",
    "--learning_rate",
    "1e-3",
    "--lr_warmup_steps",
    "4",
    "--logging_steps",
    "4",
    "--checkpointing_steps",
    "6",
    "--eval_batch_size",
    "2",
    "--ddpm_num_inference_steps",
    "2",
    "--logger",
    "none",
]
# So few timesteps, and so many renewals, that the adaptive density is far from uniform after a few steps.
ADAPTING = ["--ddpm_num_steps", "20", "--timestep_sampler_options", '{"refresh_every": 3}', "--loss_weighting", "bell"]
TINY_UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "dropout": 0.1,
}


@pytest.fixture(scope="session")
def cifar10():
    """The folder of CIFAR-10 parquet files that is shared beside the checkout."""
    folder = SHARED / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("needs CIFAR-10 as parquet files in ../shared/data/cifar10")
    return folder


@pytest.fixture(scope="session")
def digits():
    from images import open_images

    return open_images("digits")


def _run(flags, log_path, tamper):
    """In the new process: output to a file, then the script as from the command line."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import train_adaptive_ddpm

    sys.argv = ["train_adaptive_ddpm.py", *flags]
    if tamper:
        tamper(train_adaptive_ddpm)
    train_adaptive_ddpm.main(train_adaptive_ddpm.command_line(flags))


class Run:
    """One start of the training script, and what it left."""

    def __init__(self, folder, flags=(), tamper=None, settings=TINY, unet=TINY_UNET):
        self.folder = folder
        self.log_path = folder.with_suffix(".log")
        flags = [*settings, "--output_dir", str(folder), "--unet", json.dumps(unet), *map(str, flags)]
        self.process = processes.Process(target=_run, args=(flags, self.log_path, tamper))
        self.process.start()

    def wait(self, exitcode=0):
        """Wait for the end, which must be by this exit code; None for any."""
        self.process.join(120)
        assert exitcode is None or self.process.exitcode == exitcode, self.output
        return self

    @property
    def output(self):
        """Everything printed so far."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def metrics(self):
        """The records of metrics.jsonl, without what the clock says."""
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if k not in ("train_seconds", "images_per_second")} for r in records]


def run_two_ranks(folder, source, *args):
    """Run Python source with arguments in two processes that can form a process group over gloo."""
    (folder / "worker.py").write_text(source)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, folder / "worker.py", *args],
            env={**os.environ, **common, "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()


def results_of_two_ranks(tmp_path_factory, source, loss):
    """What each of two gloo processes leaves that run Python source on a folder with `loss` in it."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(loss, folder / "loss.pt")
    run_two_ranks(folder, source, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture
def train(tmp_path):
    """train("name", "--flag", value, tamper=f) starts a run in a folder of that name; `tamper(script)` comes first."""
    runs = []

    def start(name, *flags, **options):
        runs.append(Run(tmp_path / name, flags, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
