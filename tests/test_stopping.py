"""How a run ends other than by its budget, what it then says, and what goes on from there."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY, TINY, TINY_UNET, forked
from PIL import Image
from safetensors.torch import load_file

import training.clock
from training.checkpoints import checkpoint_damage
from training.clock import PhaseClock, process_age
from training.log import read_metrics
from training.stopping import Budget, StopCondition, is_launcher


def last_line(run):
    return run.output.splitlines()[-1]


# Weights that are not finite


def poison_weights(script, step, which):
    """Make the weights, or their average, NaN after `step` updates."""
    original, calls = script.train_step, iter(range(1, 10**6))

    def poisoned(state, *args):
        original(state, *args)
        if next(calls) == step:
            tensors = state.network.parameters() if which == "weights" else state.ema.shadow_params
            next(iter(tensors)).data.fill_(float("nan"))

    script.train_step = poisoned


@pytest.mark.parametrize("which", ["weights", "averaged weights"])
@pytest.mark.parametrize("step", [13, 24])
def test_weights_that_are_not_finite_are_never_saved_over_finite_ones(train, finished_run, tmp_path, which, step):
    first = finished_run(tmp_path / "run", "--max_train_steps", 12)
    good = (first / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    tamper = functools.partial(poison_weights, step=step - 12, which=which)
    run = train("run", "--resume_from_checkpoint", "latest", tamper=tamper).wait(1)
    last_good = {13: "checkpoint-12", 24: "checkpoint-18"}[step]
    assert f"{which} of step" in last_line(run)
    assert f"the last good checkpoint is {run.folder / last_good}" in last_line(run)
    assert "Traceback" not in run.output
    assert (run.folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == good
    assert not (run.folder / "checkpoint-24").exists()
    resumed = train("run", "--resume_from_checkpoint", "latest").wait()
    weights = load_file(resumed.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


# Data that changes under a run


@pytest.fixture
def pictures(tmp_path):
    """A folder of 64 small pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(64):
        add_picture(folder, i)
    return folder


def add_picture(folder, i):
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def remove_pictures(script, folder, step):
    """Delete every second picture once `step` updates are made."""
    original, calls = script.train_step, iter(range(1, 10**6))

    def step_and_remove(*args):
        original(*args)
        if next(calls) == step:
            for path in sorted(folder.glob("*.png"))[::2]:
                path.unlink()

    script.train_step = step_and_remove


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanishes_ends_in_a_checkpoint_and_one_line(train, pictures, workers):
    flags = ("--dataset_name", pictures, "--data_placement", "stream", "--dataloader_num_workers", workers)
    run = train("run", *flags, tamper=functools.partial(remove_pictures, folder=pictures, step=8)).wait(1)
    assert "Traceback" not in run.output
    assert ".png" in last_line(run)
    checkpoint = max(run.folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert int(checkpoint.name.partition("-")[2]) >= 8
    assert checkpoint_damage(checkpoint) is None
    assert f"the last good checkpoint is {checkpoint}" in last_line(run)
    for i in range(64):
        add_picture(pictures, i)
    whole = train("whole", *flags).wait()
    resumed = train("run", *flags, "--resume_from_checkpoint", "latest").wait()
    assert resumed.metrics == whole.metrics


def test_skipped_images_are_told_as_they_are_met(train, pictures):
    flags = ("--dataset_name", pictures, "--data_placement", "stream", "--on_bad_image", "skip")
    run = train("run", *flags, tamper=functools.partial(remove_pictures, folder=pictures, step=8)).wait(0)
    assert "unreadable images so far" in run.output
    assert run.metrics[-1]["skipped_images"] == 32
    assert "32 unreadable image" in last_line_with("data: ", run.output)
    assert "32 unreadable image" in (run.folder / "README.md").read_text()
    assert json.loads((run.folder / "training_summary.json").read_text())["skipped_images"] == 32


def last_line_with(start, text):
    return [line for line in text.splitlines() if line.startswith(start)][-1]


def test_data_that_has_grown_since_the_checkpoint_is_told(train, pictures):
    flags = ("--dataset_name", pictures, "--max_train_steps", 12)
    train("run", *flags).wait()
    again = train("run", *flags, "--max_train_steps", 18, "--resume_from_checkpoint", "latest").wait()
    assert "has changed since" not in again.output
    add_picture(pictures, 64)
    grown = train("run", *flags, "--max_train_steps", 24, "--resume_from_checkpoint", "latest").wait()
    assert "has changed since the checkpoint was saved: 64 images then, 65 now" in grown.output


def test_a_run_says_what_it_was_given(train, pictures):
    (pictures / "notes.txt").write_text("a caption")
    run = train("run", "--dataset_name", pictures, "--max_train_steps", 6).wait()
    assert "64 images of 65 files" in run.output
    summary = json.loads((run.folder / "training_summary.json").read_text())
    assert (summary["data"]["images"], summary["data"]["left_out"]) == (64, {".txt": 1})
    assert "64 images of 65 files; left out: 1 .txt" in (run.folder / "README.md").read_text()


def test_results_do_not_go_into_the_data(train, pictures):
    before = sorted(pictures.iterdir())
    run = train("run", "--dataset_name", pictures, "--output_dir", pictures / "run").wait(1)
    assert f"--output_dir {pictures / 'run'}: is inside --dataset_name" in last_line(run)
    assert sorted(pictures.iterdir()) == before


def test_a_bad_first_batch_of_a_stream_leaves_the_earlier_run(train, pictures):
    flags = ("--dataset_name", pictures, "--data_placement", "stream", "--max_train_steps", 6)
    first = train("run", *flags).wait()
    for i in range(1, 64):
        (pictures / f"{i:03d}.png").write_bytes(b"no image")
    train("run", *flags, "--overwrite_output_dir").wait(1)
    assert (first.folder / "checkpoint-6" / "manifest.json").exists()
    assert (first.folder / "model_index.json").exists()


# Signals


def signal_in_preview(script, number):
    """Make the previews long, and send this process a signal in the first one."""
    from pipelines import sampling

    original, calls = sampling.denoise_step, iter(range(1, 10**6))

    def slow(*args):
        time.sleep(0.2)
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return original(*args)

    sampling.denoise_step = slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_preview_is_given_up_on_a_signal(train, number):
    flags = ("--num_epochs", 1, "--save_images_epochs", 1, "--dataset_name", "digits", "--train_batch_size", 64)
    flags += ("--max_train_steps", 100, "--ddpm_num_inference_steps", 500)
    begun = time.perf_counter()
    run = train("run", *flags, tamper=functools.partial(signal_in_preview, number=number)).wait(0)
    assert time.perf_counter() - begun < 60  # a preview takes 100 seconds
    assert not (run.folder / "samples").exists()
    checkpoints = [path for path in run.folder.glob("checkpoint-*") if checkpoint_damage(path) is None]
    assert checkpoints


def test_only_a_launcher_is_taken_for_one():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    for name in ("accelerate", "accelerate.commands.launch", "torchrun", "train.py", "bash"):
        process = subprocess.Popen([*sleeper, name])
        try:
            while psutil.Process(process.pid).cmdline()[-1:] != [name]:
                time.sleep(0.01)  # until it is no longer a copy of this process
            assert is_launcher(process.pid) == (name.split(".")[0] in ("accelerate", "torchrun"))
        finally:
            process.kill()
            process.wait()


def test_a_plain_run_outlives_its_shell(monkeypatch):
    """With accelerate's variables in the environment, as `accelerate config` users may have them."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = StopCondition(Budget(Accelerator(cpu=True), PhaseClock()))
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.reason(1) is None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Clock, log and card


def test_setting_the_clock_back_changes_no_time(monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    age = process_age()
    assert 0 < age < 24 * 3600
    assert abs(PhaseClock().seconds("setup") - age) < 1


def test_without_a_clock_since_boot_setup_begins_now(monkeypatch):
    def missing(_):
        raise OSError

    monkeypatch.setattr(training.clock.time, "clock_gettime", missing)
    assert PhaseClock().seconds("setup") < 1


def test_a_damaged_line_of_the_log_costs_that_line_alone(train, finished_run, tmp_path):
    path = finished_run(tmp_path / "run", "--max_train_steps", 12) / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\xff{" + lines[1], *lines[2:]]) + b"\n")
    assert [record["step"] for record in read_metrics(path)] == [4, 12]
    again = train("run", "--resume_from_checkpoint", "latest").wait()
    assert [record["step"] for record in again.metrics] == [4, 12, 16, 20, 24]
    assert "1 damaged line(s) left out" in again.output


def test_a_damaged_line_that_is_still_json_does_not_stop_the_end(train, finished_run, tmp_path):
    path = finished_run(tmp_path / "run", "--max_train_steps", 12) / "metrics.jsonl"
    first, *others = path.read_text().splitlines()
    record = json.loads(first)
    record["density"] = [*record["density"], 0.5]  # one bit makes a comma of a point
    path.write_text("\n".join([json.dumps(record), *others]) + "\n")
    train("run", "--resume_from_checkpoint", "latest").wait()


def test_the_model_cards_command_repeats_the_run(train, tmp_path):
    run = train("run", "--max_train_steps", 6).wait()
    command = last_line_with("`accelerate launch", (run.folder / "README.md").read_text()).split("`")[1]
    words = command.replace("OTHER_FOLDER", str(tmp_path / "again")).split()
    assert words[:3] == ["accelerate", "launch", "train_adaptive_ddpm.py"]
    words[2] = str(REPOSITORY / words[2])
    done = forked([sys.executable, *words[2:]], cwd=run.folder)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(f / "checkpoint-6" / "model.safetensors") for f in (run.folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Code in checkpoints


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-was-run",)


@pytest.mark.parametrize("file", ["custom_checkpoint_0.pkl", "optimizer.bin", "process_state_0.pt"])
def test_a_checkpoint_runs_no_code(train, finished_run, tmp_path, file):
    from training.checkpoints import MANIFEST, _checksums

    checkpoint = finished_run(tmp_path / "run", "--max_train_steps", 6) / "checkpoint-6"
    torch.save(Payload(), checkpoint / file)
    (checkpoint / MANIFEST).write_text(json.dumps(_checksums(checkpoint)))
    refused = train("run", "--resume_from_checkpoint", "latest").wait(1)
    assert "--resume_from_checkpoint" in last_line(refused)
    assert "Traceback" not in refused.output
    assert not (REPOSITORY / "payload-was-run").exists()


def test_two_starts_by_the_command_line_alike(tmp_path):
    """The flags of the tests are those of a user: the script itself, in a process of its own, does what they do."""
    flags = [*TINY, "--unet", json.dumps(TINY_UNET), "--output_dir", tmp_path / "run", "--max_train_steps", 4]
    command = [sys.executable, REPOSITORY / "train_adaptive_ddpm.py", *flags]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    again = forked(command)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("train_adaptive_ddpm.py: error: --output_dir ")
