"""Processes of their own for training runs and scripts: forked from a server that has imported everything once."""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it gives
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reached for the network would fail at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else torch starts, and imports itself in, a pool of compilers

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"

processes = multiprocessing.get_context("forkserver")
# Training, generation, and what they import at the first use of the digits and of TensorBoard
processes.set_forkserver_preload(
    ["train_adaptive_ddpm", "generate", "sklearn.datasets", "torch.utils.tensorboard", "torch.distributed.fsdp"]
)

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


def _as_script(path, arguments, folder, environment, outputs):
    """In the new process: standard output and error to files, then the script as from the command line."""
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[:0] = [path, *arguments], [os.path.dirname(path)]
    runpy.run_path(path, run_name="__main__")


def forked(command, *, env=None, cwd=None, stdout=None, stderr=None, timeout=120, **_):
    """What `subprocess.run(command, capture_output=True, text=True, ...)` returns, seconds sooner: by a process that is
    forked from the server, and has little left to import.

    Args:
        command: `python script.py ...`, or `accelerate launch` of it: then as many processes of it as that starts.
        stdout: a file that is open for appending, in place of a part of what is returned.
        stderr: subprocess.STDOUT for the same place.
    """
    words, ranks = [str(word) for word in command[1:]], [{}]
    if words[:2] == ["-m", "accelerate.commands.launch"]:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        ranks, words = _ranks(int(_value_of("--num_processes", words[:script]))), words[script:]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [stdout.name if stdout else f"{folder}/stdout", f"{folder}/stderr"]
        outputs = outputs[:1] * 2 if stderr == subprocess.STDOUT else outputs
        environments = [{**(env or os.environ), **rank} for rank in ranks]
        started = [
            processes.Process(target=_as_script, args=(words[0], words[1:], cwd or os.getcwd(), environment, outputs))
            for environment in environments
        ]
        try:
            for process in started:
                process.start()
            for process in started:
                process.join(timeout)
                assert process.exitcode is not None, f"{command} runs for more than {timeout} seconds"
        finally:
            for process in started:
                process.kill()
        printed, complaints = (Path(output).read_text() if Path(output).exists() else "" for output in outputs)
    code = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess(command, code, printed, complaints)


def _value_of(flag, words):
    """Of `--flag value` or `--flag=value`."""
    text = "=".join(words)
    return text.partition(f"{flag}=")[2].partition("=")[0]


def _ranks(number):
    """The environment variables of processes that can form a process group over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "ACCELERATE_USE_CPU": "true"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def run_two_ranks(folder, source, *args):
    """Run Python source with arguments in two processes that can form a process group over gloo."""
    (folder / "worker.py").write_text(source)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
    done = forked([*launch, folder / "worker.py", *args])
    assert done.returncode == 0, done.stdout + done.stderr


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
