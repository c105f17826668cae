"""Curriculum sampling: from a logit-normal to a uniform flow time, once."""

import pytest
import torch
from sampler_helpers import make_sampler, no_host_sync


def test_curriculum_is_logit_normal_for_as_many_updates_as_given_and_uniform_from_then_on():
    sampler = make_sampler("curriculum", num_updates=5)
    first, second = make_sampler("logit_normal", m=0.8, s=1.0), make_sampler("uniform_flow")
    for n in range(12):
        sampler.sample(8)
        expected = first if n < 5 else second
        assert torch.equal(sampler.probabilities, expected.probabilities), n
        assert (sampler.relative_weights() == 1).all()


def test_the_change_does_not_wait_for_the_device(monkeypatch):
    sampler = make_sampler("curriculum", num_updates=2)
    with no_host_sync(monkeypatch):
        for _ in range(4):
            sampler.sample(8)


@pytest.mark.parametrize("draws_before", [59_990, 60_000, 60_010])
def test_curriculum_takes_as_many_updates_as_published_and_goes_on_after_a_reload(draws_before):
    sampler = make_sampler("curriculum")
    sampler.num_draws = 59_980
    while sampler.num_draws < draws_before:
        sampler.sample(8)
    loaded = make_sampler("curriculum", seed=4)
    loaded.load_state_dict(sampler.state_dict())
    for _ in range(25):
        assert torch.equal(loaded.probabilities, sampler.probabilities)
        assert torch.equal(loaded.sample(8).timesteps, sampler.sample(8).timesteps)
    assert torch.equal(sampler.probabilities, make_sampler("uniform_flow").probabilities)


@pytest.mark.parametrize("num_updates", [10, 100])
def test_a_resumed_run_may_switch_sooner_or_later(num_updates):
    sampler = make_sampler("curriculum", num_updates=num_updates)
    for _ in range(20):
        sampler.sample(8)
    resumed = make_sampler("curriculum", num_updates=30)
    resumed.load_state_dict(sampler.state_dict())
    first, second = make_sampler("logit_normal", m=0.8, s=1.0), make_sampler("uniform_flow")
    assert torch.equal(resumed.probabilities, first.probabilities)
    for n in range(20, 35):
        resumed.sample(8)
        assert torch.equal(resumed.probabilities, (first if n < 30 else second).probabilities), n
    sooner = make_sampler("curriculum", num_updates=15)
    sooner.load_state_dict(sampler.state_dict())
    assert torch.equal(sooner.probabilities, second.probabilities)


def test_a_negative_number_of_updates_is_refused():
    with pytest.raises(ValueError, match="num_updates must be an integer of at least 0, not -1"):
        make_sampler("curriculum", num_updates=-1)
