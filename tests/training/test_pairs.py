"""Examples in pairs, neighbours in t with opposite noise, on any number of processes."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from samplers import base, make_timestep_sampler, noise_coupling
from training.step_random import StepRandom

SHAPE = (1, 4, 4)


@pytest.fixture
def on_rank(monkeypatch):
    """What a function returns on a rank of so many."""

    def call(function, rank, world_size):
        for module in (base, noise_coupling):
            monkeypatch.setattr(module, "rank_and_world_size", lambda: (rank, world_size))
        return function(SimpleNamespace(process_index=rank, num_processes=world_size, device=torch.device("cpu")))

    noise_coupling._warn.cache_clear()
    yield call
    noise_coupling._warn.cache_clear()


def batch_of(size):
    def draw(accelerator):
        sampler = make_timestep_sampler(DDPMScheduler(), "adaptive", loss_weighting="none", error_filter="none")
        random = StepRandom(0, accelerator)
        random.begin(3)
        return sampler.sample(size).timesteps, random.noise(torch.zeros(size, *SHAPE), sampler.noise_coupling)

    return draw


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8])
def test_no_pair_is_lost_in_training(on_rank, batch_size, world_size, caplog):
    ranks = [on_rank(batch_of(batch_size), rank, world_size) for rank in range(world_size)]
    timesteps, noise = (torch.stack(each, 1).flatten(0, 1) for each in zip(*ranks, strict=True))
    pairs = len(timesteps) // 2
    assert torch.equal(noise[:pairs], -noise[len(noise) - pairs :])
    distances = (timesteps[:pairs] - timesteps[len(timesteps) - pairs :]).abs()
    stride = (1 + len(timesteps) % 2) * 1000 / len(timesteps)  # of an odd number, one alone may be between two
    assert pairs == 0 or distances.max() <= stride + 1  # next to each other among equally spaced draws
    assert caplog.text == ""


def test_an_odd_batch_whose_pairs_are_lost_is_warned_of_once(on_rank, caplog):
    def draw(size):
        sampler = make_timestep_sampler(DDPMScheduler(), "adaptive", loss_weighting="none", error_filter="none")
        return lambda _: sampler.noise(torch.zeros(size, *SHAPE))

    for rank, world_size, batch_size in ((0, 1, 7), (0, 2, 8), (1, 2, 8)):
        on_rank(draw(batch_size), rank, world_size)
    assert caplog.text == ""
    for _ in range(3):
        on_rank(draw(7), 0, 2)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["opposite noise in pairs"]
    assert "needs an even batch" in caplog.text
