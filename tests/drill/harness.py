"""What the parts of the drill share: starts of the scripts, runs that nothing disturbed, and comparing their folders.

A part is a module with `cases(drill)`: a list of `Case`s. A case returns when the product did right, and raises
`Failed` with the evidence when it did not.
"""

import contextlib
import functools
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from conftest import ADAPTING, SHARED, TINY, TINY_UNET, Run, processes
from safetensors.torch import load_file
from test_resuming import assert_identical

import generate
from training.checkpoints import list_checkpoints
from training.denoiser import Denoiser

TRAIN, GENERATE, EVALUATE, COMPARE = "train_adaptive_ddpm", "generate", "evaluate", "compare"
# Imported once, in the server that all starts are forked from; scikit-learn and datasets by name, as the scripts
# import them late.
PRELOAD = [TRAIN, GENERATE, EVALUATE, COMPARE, "datasets", "sklearn.datasets", "harness"]
TRAINING = [*TINY, *ADAPTING, "--unet", json.dumps(TINY_UNET)]
STREAM = ["--data_placement", "stream", "--dataloader_num_workers", "1"]
RESUME = ["--resume_from_checkpoint", "latest"]
GENERATING = ["--num_images", "48", "--batch_size", "4", "--num_inference_steps", "6"]
FORMATS = ("png", "npz", "parquet")
METHODS = ("ddpm", "adaptive")  # of the small comparison
EXTRACTOR = SHARED / "metrics" / "cifar10-regnet"
COMPARING = [
    *("--max_train_seconds", "0.5", "--methods", *METHODS, "--score_at", "1", "--dataset_name", "digits"),
    *("--resolution", "8", "--unet", json.dumps(TINY_UNET), "--logger", "none", "--logging_steps", "5"),
    *("--eval_num_images", "330", "--eval_num_inference_steps", "2", "--train_batch_size", "8"),
    *("--ddpm_num_inference_steps", "2", "--eval_feature_extractor", str(EXTRACTOR)),
]
TIMEOUT = 120  # seconds, of a start that takes two; a comparison gets more
# In checkpoints: the clock's; and Python's own generator, from which training draws nothing, and launchers do
NOT_OF_THE_RUN = ("seconds", "random_state")
EVIDENCE = 700  # characters of output that a failure keeps


class Failed(Exception):
    """The product did wrong."""

    def __init__(self, reason, evidence=""):
        super().__init__(reason)
        self.reason, self.evidence = reason, str(evidence)[-EVIDENCE:]


class Skipped(Exception):
    """The case says nothing about the product here."""


@dataclass
class Case:
    """One trial.

    Attributes:
        name: unique in its part.
        check: called with the case's own empty folder and its own random numbers.
    """

    name: str
    check: Callable[[Path, random.Random], None]


def scaled(count, scale, least=1):
    """How many of `count` trials at this scale."""
    return max(least, round(count * scale))


# Starts


def start_script(module, flags, log_path, environment, tamper):
    """In the new process: output to a file, then the script as from the command line.

    A process group of its own lets the drill end workers that outlive a killed start."""
    os.setpgid(0, 0)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    script = importlib.import_module(module)
    sys.argv = [f"{module}.py", *flags]
    if tamper:
        tamper(script)
    if module == TRAIN:
        script.main(script.command_line(flags))
    else:
        script.main(flags)


class Start(Run):
    """One start of one of the scripts; conftest's `Run`, of any script, and judged by `Failed`."""

    def __init__(self, module, folder, flags, log_path=None, tamper=None, environment=None):
        self.module, self.folder = module, Path(folder)
        self.log_path = Path(log_path or f"{folder}.log")
        self.begins_at = self.log_path.stat().st_size if self.log_path.exists() else 0  # of earlier starts' output
        flags = ["--output_dir", str(folder), *map(str, flags)]
        arguments = (module, flags, self.log_path, environment or {}, tamper)
        self.began = time.monotonic()
        self.process = processes.Process(target=start_script, args=arguments)
        self.process.start()

    def wait(self, exitcode=0, timeout=TIMEOUT):
        """Wait for the end, which must be by this exit code; None for any."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill_all()
            raise Failed(f"did not end within {timeout} s", self.output)
        if exitcode is not None and self.process.exitcode != exitcode:
            raise Failed(f"exit status {self.process.exitcode}, not {exitcode}", self.output)
        self.seconds = time.monotonic() - self.began
        return self

    def kill(self):
        """SIGKILL the process, and nothing that it has started. Whether it was still running."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def kill_all(self):
        """SIGKILL the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # which may not have had the time to found its group
        self.process.join()

    @property
    def output(self):
        """What this start has printed so far."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self.begins_at :].decode(errors="replace")

    @property
    def lines(self):
        """Lines of the output, among which the states of a progress bar."""
        return [line for line in re.split(r"[\r\n]+", self.output) if line.strip()]


@dataclass
class Starts:
    """The starts of one case, all ended with it: `with Starts() as starts`."""

    made: list = field(default_factory=list)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for start in self.made:
            start.kill_all()

    def __call__(self, module, folder, flags, **options):
        self.made.append(Start(module, folder, flags, **options))
        return self.made[-1]

    def train(self, folder, *flags, **options):
        """The tiny adaptive training; later flags win over its own."""
        return self(TRAIN, folder, [*TRAINING, *flags], **options)

    def generate(self, folder, pipeline, fmt, *flags, **options):
        """The tiny generation."""
        return self(GENERATE, folder, ["--pipeline", pipeline, *GENERATING, "--format", fmt, *flags], **options)

    def compare(self, folder, *flags, **options):
        """The tiny comparison."""
        return self(COMPARE, folder, [*COMPARING, *flags], **options)

    def train_ranks(self, count, folder, *flags, tampers=None):
        """The tiny training in several processes, which meet over gloo."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = []
        for rank in map(str, range(count)):
            environment = {**common, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(count)}
            tamper = (tampers or {}).get(int(rank))
            log_path = f"{folder}.rank{rank}.log"
            ranks.append(self.train(folder, *flags, environment=environment, tamper=tamper, log_path=log_path))
        return ranks


def wait_for(condition, what, start=None, timeout=TIMEOUT):
    """Wait until `condition()` holds, which it must while `start` runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline or (start is not None and start.process.exitcode is not None):
            raise Failed(f"never came: {what}", start.output if start else "")
        time.sleep(0.01)


def slow_steps(script, seconds):
    """Tamper: let every training step take longer."""
    original = Denoiser.epsilon_errors
    Denoiser.epsilon_errors = lambda *args: (time.sleep(seconds), original(*args))[1]


def slow_sampling(script, seconds):
    """Tamper: let every block of images take longer."""
    original = generate.sample_images
    generate.sample_images = lambda *args, **kwargs: (time.sleep(seconds), original(*args, **kwargs))[1]


# What a refusal looks like


def check_refusal(start, *parts, any_of=()):
    """The start has ended with status 1 or 2 and one line that names the script, all `parts` and one of `any_of`."""
    if start.process.exitcode == 0:
        raise Failed("accepted: exit status 0", start.output)
    if start.process.exitcode not in (1, 2):
        raise Failed(f"exit status {start.process.exitcode}, not 1 or 2", start.output)
    if "Traceback" in start.output:
        raise Failed("a traceback", start.output)
    beginning = f"{start.module}.py: error:"
    errors = [line for line in start.lines if line.startswith(beginning)]
    if len(errors) != 1 or start.lines[-1] != errors[0]:
        raise Failed("the last line is not the only error line", start.output)
    missing = [part for part in map(str, parts) if part not in errors[0]]
    if missing:
        raise Failed("the error line does not name what is at fault", f"{missing} not in: {errors[0]}")
    if any_of and not any(str(part) in errors[0] for part in any_of):
        raise Failed("the error line does not name what is at fault", f"none of {list(any_of)} in: {errors[0]}")


def snapshot(folder):
    """{relative path: bytes, or what else it is} of all there is in and under a folder."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(Path(folder).rglob("*"))}


def _content(path):
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return "folder" if path.is_dir() else path.read_bytes()


def check_unchanged(folder, before):
    """A folder is byte for byte as `snapshot` found it."""
    after = snapshot(folder)
    changes = [f"{name}: {'deleted' if name not in after else 'new' if name not in before else 'changed'}"
               for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]  # fmt: skip
    if changes:
        raise Failed("a refused start changed files", ", ".join(changes))


# What a run leaves


def check_same_run(folder, reference):
    """A finished run has the checkpoints, pipeline, log and samples of another, bit for bit but for the clock."""
    names = [[path.name for _, path in list_checkpoints(run)] for run in (folder, reference)]
    if names[0] != names[1]:
        raise Failed("other checkpoints than the undisturbed run", f"{names[0]}, not {names[1]}")
    try:
        for name in [*names[0], "unet", "scheduler", "model_index.json", "metrics.jsonl", "samples"]:
            assert_identical(_contents(folder / name), _contents(reference / name), name)
    except AssertionError as error:
        raise Failed("not bit-equal to the undisturbed run", str(error)) from None
    leftovers = [path.name for path in folder.glob("*.partial")] + [path.name for path in folder.glob(".*.partial*")]
    if leftovers:
        raise Failed("half-written files are left over", leftovers)


def _contents(path):
    """What is in a file or in a folder's files, without what the clock says."""
    if path.is_dir():
        return {file.name: _contents(file) for file in sorted(path.iterdir()) if file.name != "manifest.json"}
    if not path.exists():
        return "absent"
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.name == "metrics.jsonl":
        return metrics_of(path)
    if path.suffix in (".pt", ".bin", ".pkl"):
        return _comparable(torch.load(path, weights_only=False, map_location="cpu"))
    return path.read_bytes()


def metrics_of(path):
    """The records of a metrics.jsonl, without what the clock says."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("train_seconds", "images_per_second")} for r in records]


def _comparable(value):
    """Nested values such that `assert_identical` can compare them, without `NOT_OF_THE_RUN`."""
    if isinstance(value, dict):
        return {name: _comparable(item) for name, item in value.items() if name not in NOT_OF_THE_RUN}
    if isinstance(value, (list, tuple)):
        return dict(enumerate(map(_comparable, value)))
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    return value


def check_same_images(folder, reference):
    """generate.py left the same files; of generation.json, all but how fast it went."""
    contents = [snapshot(run) for run in (folder, reference)]
    records = [json.loads(content.pop("generation.json")) for content in contents]
    if contents[0].keys() != contents[1].keys():
        raise Failed("other files than the undisturbed run", sorted(contents[0].keys() ^ contents[1].keys()))
    differing = [name for name in contents[0] if contents[0][name] != contents[1][name]]
    timeless = [{k: r.get(k) for k in ("status", "num_images", "settings")} for r in records]
    if differing or timeless[0] != timeless[1]:
        raise Failed("not bit-equal to the undisturbed run", differing or timeless)


def check_comparison(folder):
    """compare.py finished: every method has all its scores, and none has failed. (Scores depend on the clock.)"""
    try:
        runs = json.loads((folder / "results.json").read_text())["runs"]
    except (OSError, ValueError) as error:
        raise Failed("no results.json that can be read", error) from None
    if sorted(runs) != sorted(f"{method}-seed0" for method in METHODS):
        raise Failed("not every method has a run", sorted(runs))
    for name, run in runs.items():
        if "failed" in run or len(run["scores"]) != 1:
            raise Failed("a run of the comparison failed", f"{name}: {run.get('failed', run['scores'])}")
    missing = [name for name in ("table.md", "scores.png", "densities.png") if not (folder / name).exists()]
    if missing:
        raise Failed("the report is not whole", missing)


# Runs that nothing disturbed


class References:
    """Folders of undisturbed runs, made once when first asked for; `seconds(kind)` is how long each took."""

    def __init__(self, folder):
        self.folder, self.starts, self.lock = folder, Starts(), threading.RLock()
        self.durations = {}

    def get(self, kind):
        """The folder of kind "plain", "stream", "ranks", "twelve" (half of plain), "compare" or a format of images."""
        folder = self.folder / kind
        with self.lock:
            if kind not in self.durations:
                shutil.rmtree(folder, ignore_errors=True)
                for log in self.folder.glob(f"{kind}*.log"):
                    log.unlink()
                began = time.monotonic()
                for start in self._make(kind, folder):
                    start.wait(timeout=3 * TIMEOUT)
                self.durations[kind] = time.monotonic() - began
        return folder

    def seconds(self, kind):
        """How long an undisturbed start of this kind takes."""
        self.get(kind)
        return self.durations[kind]

    def _make(self, kind, folder):
        if kind == "ranks":
            return self.starts.train_ranks(2, folder)
        if kind == "compare":
            return [self.starts.compare(folder)]
        if kind in FORMATS:
            return [self.starts.generate(folder, self.get("plain"), kind)]
        flags = {"plain": [], "stream": STREAM, "twelve": ["--max_train_steps", "12"]}[kind]
        return [self.starts.train(folder, *flags)]

    def copy(self, kind, folder):
        """A copy of a reference in another folder."""
        shutil.copytree(self.get(kind), folder)
        return folder


@dataclass
class Drill:
    """What `cases` is given.

    Attributes:
        scale: share of the trials.
        rng: random numbers of the part.
        references: undisturbed runs.
    """

    scale: float
    rng: random.Random
    references: References


def need_extractor():
    """Comparisons score by a small network that is shared beside the checkout."""
    if not EXTRACTOR.is_dir():
        raise Skipped(f"needs {EXTRACTOR}")


def bound(function, *args, **kwargs):
    """A case's check: `function(folder, rng, ...)`."""
    return functools.partial(_call_bound, function, args, kwargs)


def _call_bound(function, args, kwargs, folder, rng):
    return function(folder, rng, *args, **kwargs)
