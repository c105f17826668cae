"""The learning rate's schedule over a budget of steps, and over one of time, on which processes agree."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import run_two_ranks
from diffusers.optimization import get_scheduler

from training.clock import PhaseClock
from training.log import read_metrics
from training.optimizer import build_optimizer, override_settings
from training.options import TrainingOptions
from training.output import SUMMARY_FILE
from training.saving import read_json
from training.stopping import Budget

FALLING = ["linear", "cosine", "cosine_with_restarts", "polynomial"]


def rates(name, steps, seconds_of_step, warmup=0, **limits):
    """Learning rates of the updates, whose base is 1, where so many seconds have gone by before each."""
    clock = SimpleNamespace(seconds=lambda phase: seconds_of_step(now))
    now = 0
    budget = Budget(Accelerator(cpu=True), clock, **limits)
    options = TrainingOptions(lr_scheduler=name, learning_rate=1.0, lr_warmup_steps=warmup, max_train_seconds=1)
    optimizer, schedule = build_optimizer(options, torch.nn.Linear(1, 1), budget)
    values = []
    for now in range(steps):  # in the order of the training loop: the clock, the update, the schedule's step
        budget.look_at_clock(now)
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return torch.tensor(values)


def diffusers_rates(name, steps, total, warmup=0):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    return torch.tensor([float(schedule.lr_lambdas[0](step)) for step in range(steps)])


@pytest.mark.parametrize("limits", [{}, {"max_seconds": 1e9}])
@pytest.mark.parametrize("name", FALLING)
def test_in_a_budget_of_steps_it_is_diffusers_schedule_as_long_as_time_does_not_matter(name, limits):
    expected = diffusers_rates(name, 40, total=40, warmup=8)
    torch.testing.assert_close(rates(name, 40, float, warmup=8, max_steps=40, **limits), expected)


@pytest.mark.parametrize("name", FALLING)
def test_in_a_budget_of_time_it_falls_with_the_share_of_the_time_that_is_spent(name):
    """The time of an update sets the learning rate of the next, so that the clock is an update ahead here."""
    expected = diffusers_rates(name, 40, total=40)
    ours = rates(name, 40, lambda step: 2.0 * min(step + 1, 40), max_seconds=80.0)
    torch.testing.assert_close(ours[1:], expected[1:], atol=1e-3, rtol=1e-3)


def test_of_steps_and_time_the_lower_one_counts():
    by_time = rates("linear", 20, lambda step: 4.0 * (step + 1), max_seconds=80.0, max_steps=1000)
    by_steps = rates("linear", 20, lambda step: 0.04 * (step + 1), max_seconds=80.0, max_steps=20)
    torch.testing.assert_close(by_time[1:], by_steps[1:], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(by_time[10], torch.tensor(0.5), atol=1e-3, rtol=0)


def test_of_steps_and_time_the_lower_one_counts_even_where_steps_end_the_run():
    """Of 40 steps in 36 of 40 seconds, half of them warm-up: over steps it falls from there on alone."""
    values = rates("linear", 40, lambda step: 0.9 * step, warmup=20, max_steps=40, max_seconds=40.0)
    by_steps = diffusers_rates("linear", 40, total=40, warmup=20)
    assert float(by_steps[20]) == 1.0
    assert float(values[20]) == pytest.approx(1 - 0.9 * 19 / 40, abs=1e-3)
    assert (values <= by_steps + 1e-6).all()


def test_in_a_budget_of_time_warm_up_is_a_factor():
    without, warm = (rates("cosine", 20, lambda step: step, warmup, max_seconds=20.0) for warmup in (0, 8))
    torch.testing.assert_close(warm[:8], without[:8] * torch.arange(8) / 8)
    torch.testing.assert_close(warm[8:], without[8:])


@pytest.mark.parametrize(("name", "first"), [("constant", 1.0), ("constant_with_warmup", 0.0)])
def test_a_constant_one_is_constant_in_any_budget(name, first):
    values = rates(name, 20, lambda step: float(step), warmup=4, max_seconds=20.0)
    assert values[0] == first
    assert set(values[4:].tolist()) == {1.0}


@pytest.mark.parametrize(("max_seconds", "share"), [(100.0, 0.25), (300.0, 0.75), (75.0, 0.0), (1e-305, 0.0)])
def test_a_run_that_goes_on_has_the_learning_rate_of_what_it_has_spent(max_seconds, share):
    budget = Budget(Accelerator(cpu=True), PhaseClock(seconds={"train": 75.0}), max_seconds=max_seconds)
    options = TrainingOptions(lr_scheduler="linear", learning_rate=1.0, lr_warmup_steps=0)
    optimizer, schedule = build_optimizer(options, torch.nn.Linear(1, 1), budget)
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 30, "_last_lr": [0.1]})
    override_settings(optimizer, schedule, {"lr": 2.0})
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == pytest.approx(2 * share)


def test_a_run_by_time_has_the_learning_rate_of_the_time_that_is_spent(train):
    flags = ("--lr_scheduler", "linear", "--lr_warmup_steps", 0, "--max_train_seconds", 1, "--max_train_steps", 10**6)
    run = train("run", *flags).wait()
    records = read_metrics(run.folder / "metrics.jsonl")
    seconds = [0.0, *(record["train_seconds"] for record in records)]
    for (before, now), record in zip(pairwise(seconds), records, strict=True):
        assert 1 - now - 1e-3 <= record["lr"] / 1e-3 <= 1 - before + 1e-3
    assert read_json(run.folder / SUMMARY_FILE)["stopped_by"] == "seconds"


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("linear", {}, "--lr_scheduler linear: falls to the end of a run"),
        ("polynomial", {"max_steps": 4}, "--lr_warmup_steps 4: must be below the 4 steps of a run by polynomial"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(name, limits, message):
    with pytest.raises(ValueError, match=message):
        rates(name, 4, float, warmup=4, **limits)
    with pytest.raises(ValueError, match="--learning_rate 1e-08: must be above 1e-7"):
        TrainingOptions(lr_scheduler="polynomial", learning_rate=1e-8)


def test_a_warm_up_longer_than_a_run_of_known_length_is_refused_with_the_options():
    with pytest.raises(ValueError, match="--lr_warmup_steps 500: must be below the 400 steps"):
        TrainingOptions(lr_scheduler="polynomial", max_train_steps=400)


WORKER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from training.stopping import Budget, StopCondition

accelerator = Accelerator(cpu=True)
clock = SimpleNamespace(seconds=lambda phase: now * (1 + accelerator.process_index))  # one is twice as fast
now = 1.0
budget = Budget(accelerator, clock, max_seconds=100.0)
shares = [budget.share_of_time]
for step in range(25):
    now += 1
    budget.look_at_clock(step)
    shares.append(budget.share_of_time)
stop, step = StopCondition(budget), 24
while (reason := stop.reason(step)) is None:
    now, step = now + 1, step + 1
Path(sys.argv[1], f"shares{accelerator.process_index}").write_text(" ".join(map(str, [*shares, reason, step])))
"""


def test_processes_agree_on_the_time_of_the_one_that_is_ahead(tmp_path):
    run_two_ranks(tmp_path, WORKER, tmp_path)
    one, other = ((tmp_path / f"shares{rank}").read_text().split() for rank in range(2))
    assert one == other == ["0.02", *["0.04"] * 10, *["0.24"] * 10, *["0.44"] * 5, "seconds", "50"]
