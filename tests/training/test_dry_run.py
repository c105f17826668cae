"""A dry run says what would be trained, and leaves the folder as it was."""

import re
from types import SimpleNamespace

from accelerate import Accelerator

from training.dry_run import what_is_left
from training.stopping import Budget


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_says_what_would_be_trained_and_writes_nothing(train):
    run = train("run", "--dry_run", "--gradient_accumulation_steps", 2).wait()
    assert not run.folder.exists()
    lines = dict(line.split(None, 1) for line in run.output.splitlines() if re.match(r"[a-z]+  ", line))
    assert lines["network"] == "0.04 M parameters"
    assert lines["data"] == "1,797 images an epoch, 8x8, placed: memory"
    assert lines["batch"] == "8 x 2 accumulated x 1 processes = 16 images a step"
    assert lines["method"] == "adaptive: AdaptiveSampler"
    assert re.fullmatch(r"[\d.e-]+ s \(mean of 3\), [\d.,e+]+ images/s", lines["step"])
    assert re.fullmatch(r"[\d,]+ MiB in use by this process", lines["memory"])
    assert lines["run"].startswith("about 24 steps, 0.2 epochs, 0:0")


def test_of_a_run_that_would_go_on_or_be_replaced(train):
    run = train("run", "--max_train_steps", 6).wait()
    before = contents(run.folder)
    resumed = train("run", "--dry_run", "--resume_from_checkpoint", "latest").wait()
    assert "about 18 steps from step 6 on, " in resumed.output
    assert contents(run.folder) == before
    train("run", "--dry_run", "--overwrite_output_dir").wait()
    assert contents(run.folder) == before


def test_what_cannot_work_is_refused_by_it_too(train):
    run = train("run", "--dry_run", "--unet", '{"norm_num_groups": 3}').wait(1)
    assert "UNet2DModel cannot use it" in run.output.splitlines()[-1]


def test_what_is_spent_is_not_to_come(train):
    train("run", "--max_train_steps", 6).wait()
    past = train("run", "--dry_run", "--resume_from_checkpoint", "latest", "--max_train_steps", 4).wait()
    assert "about 0 steps from step 6 on, 0.0 epochs, 0:00:00 of training" in past.output
    state = SimpleNamespace(step=10, images_per_step=20, clock=SimpleNamespace(seconds=lambda phase: 3600.0))
    for limits, expected in (
        ({"max_seconds": 3660.0}, "about 120 steps from step 10 on, 24.0 epochs, 0:01:00 of training"),
        ({"max_seconds": 10.0}, "about 0 steps from step 10 on, 0.0 epochs, 0:00:00 of training"),
        ({"max_steps": 2**53}, "about 9,007,199,254,740,982 steps from step 10 on"),
    ):
        budget = Budget(Accelerator(cpu=True), state.clock, **limits)
        assert what_is_left(budget, state, 0.5, images_per_epoch=100).startswith(expected)
