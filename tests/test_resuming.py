"""A run killed at any moment and resumed is the run that was never stopped, bit for bit."""

import functools
import json
import os
import shutil
import signal
import time

import pytest
import torch
import yaml
from conftest import ADAPTING, Run
from safetensors.torch import load_file

from training.denoiser import Denoiser


def kill_at(script, module, function, call, after):
    """SIGKILL this process before (or after) call number `call` of a function that the run makes."""
    import importlib

    module = importlib.import_module(module)
    original = getattr(module, function)
    calls = iter(range(1, 10**6))

    def deadly(*args, **kwargs):
        now = next(calls) == call
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, function, deadly)


def signal_at(script, at, number):
    """Send this process a signal within a training step."""
    original = Denoiser.epsilon_errors
    calls = iter(range(10**6))

    def interrupted(*args):
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return original(*args)

    Denoiser.epsilon_errors = interrupted


def final_state(folder):
    """Everything that a run ends with: weights, optimiser, average, sampler and log."""
    checkpoint = folder / "checkpoint-24"
    state = torch.load(checkpoint / "process_state_0.pt")
    state.pop("seconds")
    return {
        "unet": load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        "weights": load_file(checkpoint / "model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.bin", weights_only=False)["state"],
        "state": state,
    }


def assert_identical(a, b, where="run"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("reference") / "run", ADAPTING).wait()
    probabilities = final_state(run.folder)["state"]["sampler"]["probabilities"]
    assert probabilities.max() > 1.5 * probabilities.min()  # else no test here would see an adapted density
    return run


@pytest.fixture
def train(train):
    """As everywhere, with an adaptive density that adapts."""
    return lambda name, *flags, **options: train(name, *ADAPTING, *flags, **options)


KILLS = {  # module, function, number of its call, and whether the kill comes after the call
    "in the first step": ("train_adaptive_ddpm", "mean_squares", 1, False),
    "between two checkpoints": ("train_adaptive_ddpm", "mean_squares", 16, False),
    "as a save begins": ("training.state", "save_checkpoint", 2, False),
    "inside a save, before the manifest": ("training.checkpoints", "_checksums", 2, False),
    "inside a save, before the rename": ("training.checkpoints", "_checksums", 2, True),
    "before old checkpoints are deleted": ("training.checkpoints", "list_checkpoints", 3, False),
    "before the pipeline is saved": ("training.results", "save_pipeline", 1, False),
    "inside a save, before the sampler's state": ("accelerate.accelerator", "save_accelerator_state", 3, True),
    "inside the saving of the pipeline": ("training.saving", "named_save_errors", 1, True),
    "between two parts of the pipeline": ("os", "replace", 6, False),
}


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed(train, never_stopped, kill):
    module, function, call, after = KILLS[kill]
    deadly = functools.partial(kill_at, module=module, function=function, call=call, after=after)
    train("run", tamper=deadly).wait(-signal.SIGKILL)
    resumed = train("run", "--resume_from_checkpoint", "latest").wait()
    assert_identical(final_state(resumed.folder), final_state(never_stopped.folder))
    assert resumed.metrics == never_stopped.metrics
    assert [path.name for path in resumed.folder.rglob(".*")] == [".written_files"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(train, never_stopped, number):
    stopped = train("run", tamper=functools.partial(signal_at, at=14, number=number)).wait(0)
    assert (stopped.folder / "checkpoint-15").is_dir()
    assert json.loads((stopped.folder / "training_summary.json").read_text())["stopped_by"] == "signal"
    assert "--resume_from_checkpoint latest" in stopped.output
    resumed = train("run", "--resume_from_checkpoint", "latest").wait()
    assert_identical(final_state(resumed.folder), final_state(never_stopped.folder))
    assert resumed.metrics == never_stopped.metrics


def test_killed_from_outside_at_no_chosen_moment(train, never_stopped):
    run = train("run", tamper=functools.partial(slow_down, seconds=0.05))
    while not list(run.folder.glob("checkpoint-6")):
        time.sleep(0.01)
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait(-signal.SIGKILL)
    resumed = train("run", "--resume_from_checkpoint", "latest").wait()
    assert_identical(final_state(resumed.folder), final_state(never_stopped.folder))


def slow_down(script, seconds):
    original = Denoiser.epsilon_errors
    Denoiser.epsilon_errors = lambda *args: (time.sleep(seconds), original(*args))[1]


@pytest.mark.parametrize("harm", ["cut short", "changed", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train, finished_run, never_stopped, tmp_path, harm):
    newest = finished_run(tmp_path / "run", *ADAPTING, "--max_train_steps", 12) / "checkpoint-12"
    victim = newest / ("manifest.json" if harm == "no manifest" else "optimizer.bin")
    content = victim.read_bytes()
    if harm == "cut short":
        victim.write_bytes(content[:-100])
    elif harm == "changed":
        victim.write_bytes(content[:500] + b"x" + content[501:])
    else:
        victim.unlink()
    refused = train("run", "--resume_from_checkpoint", newest).wait(1)
    assert "--resume_from_checkpoint" in refused.output.splitlines()[-1]
    assert victim.name in refused.output.splitlines()[-1]
    resumed = train("run", "--resume_from_checkpoint", "latest").wait()
    assert "checkpoint-12 cannot be read and is passed over" in resumed.output
    assert "resumed from" in resumed.output
    assert_identical(final_state(resumed.folder), final_state(never_stopped.folder))
    assert resumed.metrics == never_stopped.metrics


def test_a_run_can_be_made_longer(train, never_stopped):
    train("run", "--max_train_steps", 14).wait()
    resumed = train("run", "--resume_from_checkpoint", "latest").wait()
    assert "max_train_steps 24, which was 14" in resumed.output
    assert_identical(final_state(resumed.folder), final_state(never_stopped.folder))
    assert resumed.metrics == never_stopped.metrics


@pytest.mark.parametrize(("limit", "kept"), [(1, [24]), (0, [6, 12, 18, 24])])
def test_so_many_checkpoints_are_kept_and_by_0_all(train, limit, kept):
    run = train("run", "--checkpoints_total_limit", limit).wait()
    assert {path.name for path in run.folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in kept}


def test_latest_without_a_checkpoint_starts_a_run(train, never_stopped):
    run = train("run", "--resume_from_checkpoint", "latest").wait()
    assert "has no checkpoint; a new run begins" in run.output
    assert_identical(final_state(run.folder), final_state(never_stopped.folder))


def test_going_back_to_an_earlier_checkpoint_gives_up_the_later_ones(train, never_stopped, tmp_path):
    shutil.copytree(never_stopped.folder, tmp_path / "run")
    flags = ("--resume_from_checkpoint", "checkpoint-18", "--learning_rate", 1e-4)
    before = contents(tmp_path / "run")
    refused = train("run", *flags).wait(1)
    assert "checkpoint-18: is of step 18, and the run" in refused.output.splitlines()[-1]
    assert "has come to step 24" in refused.output.splitlines()[-1]
    assert "--overwrite_output_dir" in refused.output.splitlines()[-1]
    assert contents(refused.folder) == before
    back = train("run", *flags, "--overwrite_output_dir").wait()
    assert "checkpoint-24 is discarded" in back.output
    assert "--learning_rate 0.0001, which was 0.001" in back.output
    assert [r["lr"] for r in back.metrics] == [1e-3] * 4 + [1e-4] * 2
    new, old = (load_file(run.folder / "checkpoint-24" / "model.safetensors") for run in (back, never_stopped))
    assert not torch.equal(new["conv_in.weight"], old["conv_in.weight"])


def test_the_end_of_a_run_without_a_checkpoint_there_is_not_lost_either(train, never_stopped, tmp_path):
    shutil.copytree(never_stopped.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-24")
    flags = ("--resume_from_checkpoint", "checkpoint-18")
    refused = train("run", *flags).wait(1)
    assert "has come to step 24" in refused.output.splitlines()[-1]
    train("run", *flags, "--dry_run").wait(0)  # which loses nothing


def test_another_runs_checkpoint_can_be_gone_on_from(train, never_stopped, tmp_path):
    run = train("elsewhere", "--resume_from_checkpoint", never_stopped.folder / "checkpoint-18").wait()
    assert_identical(final_state(run.folder), final_state(never_stopped.folder))


def test_another_runs_checkpoint_is_kept_from_the_first_moment(train, never_stopped):
    """So that a run killed before a checkpoint of its own goes on from there, and not from nothing."""
    deadly = functools.partial(kill_at, module="train_adaptive_ddpm", function="mean_squares", call=1, after=False)
    flags = ("--resume_from_checkpoint", never_stopped.folder / "checkpoint-18")
    train("elsewhere", *flags, tamper=deadly).wait(-signal.SIGKILL)
    resumed = train("elsewhere", "--resume_from_checkpoint", "latest").wait()
    assert "resumed from" in resumed.output
    assert_identical(final_state(resumed.folder), final_state(never_stopped.folder))


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--max_train_steps 24 is spent, as the run in {} has had 24 steps"),
        (("--max_train_steps", 20), "--max_train_steps 20 is spent, as the run in {} has had 24 steps"),
        (("--num_epochs", 1, "--train_batch_size", 128), "--num_epochs 1, 15 steps, is spent"),
        (("--max_train_steps", 99, "--max_train_seconds", 0.001), "--max_train_seconds 0.001 is spent"),
    ],
)
def test_a_finished_run_resumed_has_nothing_to_train_and_stays_as_it_is(train, never_stopped, tmp_path, flags, message):
    shutil.copytree(never_stopped.folder, tmp_path / "run")
    before = contents(tmp_path / "run")
    again = train("run", "--logging_steps", 7, *flags, "--resume_from_checkpoint", "latest").wait(0)
    assert f"nothing to train: {message.format(again.folder)}" in again.output.splitlines()[-1]
    assert contents(again.folder) == before


def test_a_life_that_is_killed_at_its_end_is_finished_though_an_earlier_one_had_come_there(
    train, never_stopped, tmp_path
):
    """Its last checkpoint is of the step that the earlier life's summary told of; but its pipeline was not saved."""
    shutil.copytree(never_stopped.folder, tmp_path / "run")
    flags = ("--learning_rate", 1e-4)
    deadly = functools.partial(kill_at, module="training.results", function="save_pipeline", call=1, after=False)
    back = ("--resume_from_checkpoint", "checkpoint-18", "--overwrite_output_dir")
    train("run", *back, *flags, tamper=deadly).wait(-signal.SIGKILL)
    resumed = train("run", "--resume_from_checkpoint", "latest", *flags).wait()
    assert "nothing to train" not in resumed.output
    new, old = (final_state(run.folder)["unet"]["conv_in.weight"] for run in (resumed, never_stopped))
    assert not torch.equal(new, old)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--method", "ddpm", "--timestep_sampler_options", "{}"),
            "its sampler is AdaptiveSampler, not UniformSampler",
        ),
        (("--loss_weighting", "spectral"), "its loss_weighting is bell, not spectral"),
        (("--error_filter", "none"), "its error_filter is WienerFilter, not mean_squares"),
    ],
)
def test_another_sampler_or_objective_cannot_take_over(train, flags, message):
    train("run", "--max_train_steps", 6).wait()
    run = train("run", "--resume_from_checkpoint", "latest", *flags).wait(1)
    assert "--resume_from_checkpoint" in run.output.splitlines()[-1]
    assert message in run.output.splitlines()[-1]
    options = yaml.safe_load((run.folder / "training_options.yaml").read_text())
    assert options["method"] == "adaptive"  # what cannot be gone on with leaves no trace


def test_streamed_data_resume_alike(train):
    flags = ("--data_placement", "stream", "--dataloader_num_workers", 1)
    whole = train("whole", *flags).wait()
    train("run", *flags, tamper=functools.partial(signal_at, at=8, number=signal.SIGTERM)).wait()
    resumed = train("run", *flags, "--resume_from_checkpoint", "latest").wait()
    assert_identical(final_state(resumed.folder), final_state(whole.folder))


# Updates that are not finite


def poison(script, steps):
    """Make the loss NaN in these steps."""
    original = Denoiser.epsilon_errors
    calls = iter(range(10**6))

    def poisoned(*args):
        errors = original(*args)
        return errors * float("nan") if next(calls) in steps else errors

    Denoiser.epsilon_errors = poisoned


def test_a_nan_is_skipped_counted_and_does_no_harm(train):
    run = train("run", "--no_use_ema", "--max_train_steps", 6, tamper=functools.partial(poison, steps={5})).wait()
    assert run.metrics[-1]["skipped_updates"] == 1
    five = train("five", "--no_use_ema", "--max_train_steps", 5).wait()
    after_nan, before = (load_file(r.folder / "unet" / "diffusion_pytorch_model.safetensors") for r in (run, five))
    assert_identical(after_nan, before)


def test_the_sampler_and_the_log_outlive_a_nan(train):
    run = train("run", tamper=functools.partial(poison, steps={3, 9, 10})).wait()
    assert [r["skipped_updates"] for r in run.metrics] == [1, 1, 3, 3, 3, 3]
    assert all(r["loss"] > 0 for r in run.metrics)
    assert all(torch.isfinite(v).all() for v in final_state(run.folder)["weights"].values())


def test_too_many_nans_in_a_row_stop_the_run(train):
    run = train("run", "--max_nonfinite_steps", 4, tamper=functools.partial(poison, steps=range(9, 24))).wait(1)
    assert "--max_nonfinite_steps 4" in run.output.splitlines()[-1]
    assert not (run.folder / "checkpoint-24").exists()
    assert (run.folder / "checkpoint-6").exists()
