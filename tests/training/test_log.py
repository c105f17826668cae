"""What a run says while it goes on."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, forked

from training.metrics import LossMeter

ALONE = SimpleNamespace(reduce=lambda sums, reduction: sums)  # an accelerator of one process


def test_where_there_is_no_terminal_each_record_is_a_line_and_no_bar_is_drawn(train):
    run = train("run", "--max_train_steps", 10, "--eval_batch_size", 0).wait()
    lines = [line for line in run.output.splitlines() if line.startswith("step ")]
    assert [line.partition(",")[0] for line in lines] == ["step 4/10", "step 8/10", "step 10/10"]
    assert all("loss 0." in line or "loss 1." in line for line in lines)
    assert "it/s" not in run.output
    assert "step/s" not in run.output


def test_help_has_the_options_under_their_headings():
    done = forked([sys.executable, REPOSITORY / "train_adaptive_ddpm.py", "--help"])
    assert done.returncode == 0, done.stderr
    sections = [section.partition(":\n")[::2] for section in done.stdout.split("\n\n")]
    flags = {heading.strip(): body for heading, body in sections}
    assert "--validation_split" in flags["Loss by timestep on held-out images"]
    assert "--ddpm_num_steps" in flags["Model and noise"]
    assert "--timestep_sampler" in flags["Method"]
    assert "--checkpointing_steps" in flags["Checkpoints"]
    assert sum("--seed" in body for body in flags.values()) == 1


def test_the_meter_counts_the_updates_whose_gradient_was_clipped():
    meter = LossMeter(1000, "cpu")
    assert meter.read(ALONE)[:3] == (None, None, None)
    for norm in (0.5, 1.0, 1.5, 40.0, torch.nan, torch.inf):  # the last two are no updates
        meter.add_gradient_norm(torch.tensor(norm), max_norm=1.0)
    restored = LossMeter(1000, "cpu")
    restored.load_state_dict(meter.state_dict())
    for read in (meter.read(ALONE), restored.read(ALONE)):
        assert read.grad_norm == pytest.approx(43 / 4)
        assert read.grad_norm_clipped == pytest.approx(2 / 4)
    meter.add_gradient_norm(torch.tensor(40.0), max_norm=torch.inf)
    assert meter.read(ALONE).grad_norm_clipped == 0  # of those since the last time


def test_the_log_says_how_often_gradients_were_clipped(train):
    flags = ("--max_train_steps", 4, "--logging_steps", 1, "--eval_batch_size", 0)
    runs = [train(f"at_{norm}", *flags, "--max_grad_norm", norm) for norm in (1e-9, "inf")]
    always, never = (run.wait().metrics for run in runs)
    assert [r["grad_norm_clipped"] for r in always] == [1, 1, 1, 1]
    assert [r["grad_norm_clipped"] for r in never] == [0, 0, 0, 0]
    assert always[0]["grad_norm"] == never[0]["grad_norm"] > 1e-3  # before clipping
