"""The learning rate's schedule over a budget of steps, and over one of time, on which processes agree."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import run_two_ranks
from diffusers.optimization import get_scheduler

from training.clock import PhaseClock
from training.optimizer import build_optimizer
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


@pytest.mark.parametrize("name", FALLING)
def test_in_a_budget_of_steps_it_is_diffusers_schedule(name):
    expected = diffusers_rates(name, 40, total=40, warmup=8)
    torch.testing.assert_close(rates(name, 40, lambda step: 0.0, warmup=8, max_steps=40), expected)


@pytest.mark.parametrize("name", FALLING)
def test_in_a_budget_of_time_it_falls_with_the_share_of_the_time_that_is_spent(name):
    """The time of an update sets the learning rate of the next, so that the clock is half a second ahead here."""
    expected = diffusers_rates(name, 40, total=40)
    ours = rates(name, 40, lambda step: 2.0 * min(step + 1, 40), max_seconds=80.0)
    torch.testing.assert_close(ours[1:], expected[1:], atol=1e-3, rtol=1e-3)


def test_of_steps_and_time_what_is_spent_first_counts():
    by_time = rates("linear", 20, lambda step: 4.0 * (step + 1), max_seconds=80.0, max_steps=1000)
    by_steps = rates("linear", 20, lambda step: 0.04 * (step + 1), max_seconds=80.0, max_steps=20)
    torch.testing.assert_close(by_time[1:], by_steps[1:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(by_time[10], torch.tensor(0.5), atol=1e-3, rtol=0)


def test_in_a_budget_of_time_warm_up_is_a_factor():
    without, warm = (rates("cosine", 20, lambda step: step, warmup, max_seconds=20.0) for warmup in (0, 8))
    torch.testing.assert_close(warm[:8], without[:8] * torch.arange(8) / 8)
    torch.testing.assert_close(warm[8:], without[8:])


@pytest.mark.parametrize(("name", "first"), [("constant", 1.0), ("constant_with_warmup", 0.0)])
def test_a_constant_one_is_constant_in_any_budget(name, first):
    values = rates(name, 20, lambda step: float(step), warmup=4, max_seconds=20.0)
    assert values[0] == first
    assert set(values[4:].tolist()) == {1.0}


def test_a_run_that_goes_on_has_spent_what_it_has_spent():
    budget = Budget(Accelerator(cpu=True), PhaseClock(seconds={"train": 75.0}), max_seconds=100.0)
    assert budget.spent(0) == 0.75
    assert not budget.is_out_of_time


def test_a_run_by_time_ends_at_a_learning_rate_of_0(train):
    run = train("run", "--lr_scheduler", "linear", "--max_train_seconds", "1", "--max_train_steps", "100000").wait()
    rates = [record["lr"] for record in run.metrics]
    assert read_json(run.folder / SUMMARY_FILE)["stopped_by"] == "seconds"
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1e-3


WORKER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from training.stopping import Budget

accelerator = Accelerator(cpu=True)
clock = SimpleNamespace(seconds=lambda phase: now * (1 + accelerator.process_index))  # one is twice as fast
now = 1.0
budget = Budget(accelerator, clock, max_seconds=100.0)
shares = [budget.spent(0)]
for step in range(25):
    now += 1
    budget.look_at_clock(step)
    shares.append(budget.spent(step))
Path(sys.argv[1], f"shares{accelerator.process_index}").write_text(" ".join(map(str, shares)))
"""


def test_processes_agree_on_the_time_of_the_one_that_is_ahead(tmp_path):
    run_two_ranks(tmp_path, WORKER, tmp_path)
    one, other = ((tmp_path / f"shares{rank}").read_text().split() for rank in range(2))
    assert one == other == ["0.02", *["0.04"] * 10, *["0.24"] * 10, *["0.44"] * 5]
