"""Processes of their own for training runs and scripts: forked from a server that has imported everything once."""

import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it gives
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reached for the network would fail at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else torch starts, and imports itself in, a pool of compilers

gc.disable()  # while test modules import what they need: that takes a quarter less time so

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"

processes = multiprocessing.get_context("forkserver")
# Training, generation, and what they import at the first use of the digits, of TensorBoard and of scores
processes.set_forkserver_preload(
    ["train_adaptive_ddpm", "generate", "sklearn.datasets", "torch.utils.tensorboard", "torch.distributed.fsdp"]
    + ["scoring.frechet_metric", "transformers.models.regnet.modeling_regnet"]
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

# A layer of each kind, once where that can be; attention is in the middle. For where each layer is compiled.
COMPILED_UNET = {
    **TINY_UNET,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "dropout": 0.0,
}


def pytest_collection_finish():
    """Look for garbage again, but not through all that was imported."""
    gc.freeze()
    gc.enable()


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


@pytest.fixture(scope="session")
def regnet():
    """The folder of the small feature extractor, a RegNet trained on CIFAR-10; its features are 320."""
    folder = SHARED / "metrics" / "cifar10-regnet"
    if not folder.is_dir():
        pytest.skip("needs the feature extractor in ../shared/metrics/cifar10-regnet")
    return str(folder)


@pytest.fixture(scope="session")
def few_digits(digits, tmp_path_factory):
    """A file of the first 340 digits: not many more than a feature extractor with 320 features needs to tell them."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = torch.stack([digits[i] for i in range(340)])
    np.savez(path, images.permute(0, 2, 3, 1).numpy())
    return path


def _begin_anew():
    """In the new process: what it starts itself is started as by a script. It has inherited the method by which it was
    started: the data workers of a run would come from a server of their own, which imports everything once more, and
    which outlives the run if that is killed."""
    multiprocessing.set_start_method(None, force=True)


def _run(flags, log_path, tamper):
    """In the new process: output to a file, then the script as from the command line."""
    _begin_anew()
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
        self.process.join(300)
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


def _as_script(path, arguments, folder, outputs, environment):
    """In the new process: standard output and error to files, then the script as from the command line."""
    _begin_anew()
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[:0] = [path, *arguments], [os.path.dirname(path)]
    runpy.run_path(path, run_name="__main__")


class Forked:
    """A command that starts a Python script, begun seconds sooner: by a process that is forked from the server, and has
    little left to import.

    Args:
        command: `python script.py ...`, or `accelerate launch` of it: then as many processes of it as that starts.
        environment, folder: that it runs in; by default, these of this process.
        outputs: paths of files for standard output and error; by default, temporary ones.
    """

    def __init__(self, command, environment=None, folder=None, outputs=None):
        words, ranks = [str(word) for word in command[1:]], [{}]
        if words[:2] == ["-m", "accelerate.commands.launch"]:
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            ranks, words = _ranks(int(_value_of("--num_processes", words[:script]))), words[script:]
        self.command, self.scratch = command, tempfile.TemporaryDirectory()
        self.outputs = outputs or [f"{self.scratch.name}/{name}" for name in ("stdout", "stderr")]
        common = words[0], words[1:], folder or os.getcwd(), self.outputs
        self.processes = [
            processes.Process(target=_as_script, args=(*common, {**(environment or os.environ), **rank}))
            for rank in ranks
        ]
        for process in self.processes:
            process.start()

    def kill(self, number=signal.SIGKILL):
        """Send a signal to every process that lives."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout=120):
        """The end, as a subprocess.CompletedProcess; its exit code is 1, the launcher's, if one of several failed."""
        try:
            for process in self.processes:
                process.join(timeout)
                assert process.exitcode is not None, f"{self.command} runs for more than {timeout} seconds"
                timeout = timeout if process.exitcode == 0 else 10  # for the others: they may wait for it forever
        finally:
            self.kill()
        codes = [process.exitcode for process in self.processes]
        code = codes[0] if len(codes) == 1 else int(any(codes))
        printed = [Path(output).read_text() if Path(output).exists() else "" for output in self.outputs]
        self.scratch.cleanup()
        return subprocess.CompletedProcess(self.command, code, *printed)


def forked(command, *, env=None, cwd=None, stdout=None, stderr=None, timeout=120, **_):
    """What subprocess.run(command, capture_output=True, text=True) returns, by `Forked`; `stdout` may be a file that is
    open for appending, and `stderr` subprocess.STDOUT."""
    outputs = [stdout.name] * 2 if stdout and stderr == subprocess.STDOUT else None
    return Forked(command, env, cwd, outputs).wait(timeout)


def fork_all_but_the_first(module, monkeypatch):
    """Let a module that launches by subprocess.run do so once; then `forked` does it."""
    launches = iter([subprocess.run])
    own = {"run": lambda *args, **options: next(launches, forked)(*args, **options)}
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(**{**vars(subprocess), **own}))


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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """finished_run(folder, "--flag", value): a copy, in a new folder, of what a run with these flags leaves, which is
    made once."""
    runs = {}

    def copy(folder, *flags):
        if flags not in runs:
            runs[flags] = Run(tmp_path_factory.mktemp("finished") / "run", flags).wait()
        shutil.copytree(runs[flags].folder, folder)
        return folder

    return copy
