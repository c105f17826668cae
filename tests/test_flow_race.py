"""The race of flows in benchmarks/flow_matching.py: its losses and steps by closed form, and that it runs."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from diffusers import FlowMatchEulerDiscreteScheduler

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import flow_entrants
import flow_matching

from recipes import parse_options
from samplers import make_timestep_sampler


class Distance:
    """An evaluator's score that needs no feature extractor."""

    name, feature_extractor = "fd", {"name": "mean", "weights_sha256": "0", "num_features": 1}

    def __init__(self, options, dataset, state, seed, batch_size):
        self.options, self.dataset, self.device, self.seed = options, dataset, state.device, seed

    def score_of(self, draw):
        images = draw(range(3))
        assert images.dtype == torch.uint8
        assert images.shape[1:] == self.dataset.image_shape
        return float(images.float().mean())


@pytest.fixture
def flow_race(tmp_path, monkeypatch):
    """The race of flow_matching.py with a tiny transformer, two updates a run; called with further flags."""
    monkeypatch.setattr(flow_matching, "Evaluator", Distance)
    monkeypatch.setattr(sys, "argv", ["benchmarks/flow_matching.py"])
    flags = ["--dataset_name", "digits", "--model", "dit", "--class_conditional", "--train_batch_size", "4"]
    flags += ["--dit", '{"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}', "--random_flip"]
    flags += ["--score_at_images", "4", "8", "--eval_num_inference_steps", "2", "--seeds", "7"]
    flags += ["--output_dir", str(tmp_path / "race")]

    def run(*more):
        flow_matching.main(parse_options(flow_matching.FlowMatchingOptions, [*flags, *more]))
        return tmp_path / "race"

    return run


def test_the_race_of_flows_is_in_equal_time_and_in_equal_images(flow_race):
    """As its recipes have it: each ladder ends with the scores by all ways of sampling."""
    folder = flow_race("--entrants", "uniform", "adaptive", "--max_train_seconds", "0.001", "--score_at", "1")
    table = (folder / "table.md").read_text()
    for heading in ("## Equal time", "## Equal images"):
        assert "FD by shift 3" in table.partition(heading)[2].partition("\n## ")[0]


def test_the_race_of_flows_runs_in_parts_and_reports_all(flow_race):
    names = ("uniform", "shift_3", "adaptive", "contrastive")
    folder = flow_race("--entrants", *names, "--stop_after", "1e-9")
    assert [path.name for path in folder.iterdir()] == ["uniform-seed7.json"]
    first = (folder / "uniform-seed7.json").read_text()
    flow_race("--entrants", *names)
    assert (folder / "uniform-seed7.json").read_text() == first
    results = json.loads((folder / "results.json").read_text())
    assert set(results["runs"]) == {f"{name}-seed7" for name in names}
    for run in results["runs"].values():
        assert [score["images"] for score in run["scores"]] == [4, 8]
        assert [sorted(score["scores"]) for score in run["scores"]] == [["own schedule"], ["own schedule", "shift 3"]]
    last = results["runs"]["shift_3-seed7"]["scores"][-1]["scores"]
    assert last["own schedule"] == last["shift 3"]
    assert "| `adaptive` |" in (folder / "table.md").read_text()
    assert (folder / "scores.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--entrants", "uniform", "karras"], "--entrants karras: must be of uniform, "),
        (["--method", "ddpm"], "--method ddpm: is not for this race"),
        (["--dry_run"], "--dry_run True: is not for this race"),
        (["--seed", "3"], "--seed 3: is not for this race"),
        (
            ["--lr_scheduler", "cosine", "--score_at_images", "8", "16"],
            "--lr_scheduler cosine: must be constant in this race",
        ),
        (["--score_at_images", "6"], "--score_at_images 6: must be a multiple of the 4 images of an update"),
        (["--score_at", "2", "--max_train_seconds", "1"], r"--score_at 2.0: must be in \(0, 1\]"),
    ],
)
def test_a_race_of_flows_that_cannot_be_ends_with_a_message(flags, message, flow_race):
    with pytest.raises(SystemExit, match=message):
        flow_race(*flags)


def test_a_race_of_flows_does_not_mix_settings(flow_race):
    flow_race("--entrants", "uniform", "--stop_after", "1e-9")
    with pytest.raises(SystemExit, match=r"its learning_rate is 0\.0001, not 0\.1"):
        flow_race("--learning_rate", "0.1")


def test_a_run_of_flows_that_failed_is_said_to_have_and_made_again(flow_race, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(flow_matching, "sample_by_euler", partial(broken_samples, flow_matching.sample_by_euler))
        folder = flow_race("--entrants", "uniform")
    (run,) = json.loads((folder / "results.json").read_text())["runs"].values()
    assert run["failed"] == "samples are not finite"
    assert not run["scores"]
    flow_race("--entrants", "uniform")
    (run,) = json.loads((folder / "results.json").read_text())["runs"].values()
    assert "failed" not in run


def broken_samples(sample, network, shift, num_steps, noise, labels):
    return sample(network, shift, num_steps, noise * torch.nan, labels)


def test_the_losses_of_the_race_are_those_of_the_velocity():
    """Of a network that predicts zero: the mean square of eps - x_0, by whichever lines, but for how it is weighed."""
    scheduler, images = FlowMatchEulerDiscreteScheduler(), torch.full((20_000, 1, 2, 2), 0.5)
    zero = lambda x, timesteps, class_labels: SimpleNamespace(sample=torch.zeros_like(x))  # noqa: E731
    expected = {"contrastive": 0.95 * 1.25, "cosmap": 1.25, "immiscible": None, "adaptive": None}
    for name, entrant in flow_entrants.all_entrants(10, class_conditional=True).items():
        torch.manual_seed(0)
        spectrum = torch.randn(64, 1, 2, 2)
        sampler = entrant.sampler and make_timestep_sampler(scheduler, images=spectrum, **entrant.sampler)
        loss = float(flow_entrants.loss_of(zero, scheduler, entrant, sampler, images, None))
        if (value := expected.get(name, 1.25)) is not None:
            assert loss == pytest.approx(value, rel=0.02), name
    other = flow_entrants.others(50)
    assert not (other == torch.arange(50)).any()
    assert set(torch.cat([flow_entrants.others(5) for _ in range(100)]).tolist()) == set(range(5))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_follow_a_straight_flow_to_its_end(shift):
    """The velocity of the flow to a single image, (x - image) / sigma, leads there from any noise in any steps."""
    image = torch.tensor([-1.0, -0.2, 0.6, 1.0]).view(1, 1, 2, 2)
    network = lambda x, t, class_labels: SimpleNamespace(sample=(x - image) / (t / 1000).view(-1, 1, 1, 1))  # noqa: E731
    drawn = flow_entrants.sample_by_euler(network, shift, 5, torch.randn(3, 1, 2, 2), None)
    assert drawn.tolist() == 3 * [[[[0, 102], [204, 255]]]]
