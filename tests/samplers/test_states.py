"""Every sampler's state: saved and reloaded it goes on with the very same draws, and another's is refused."""

import pytest
import torch
from accelerate import Accelerator
from sampler_helpers import (
    adapt,
    assert_same_state,
    draws,
    every_sampler,
    falling_loss,
    make_adapted,
    random_images,
    scheduler,
    state_bits,
)

from samplers import TIMESTEP_SAMPLERS, make_timestep_sampler


@every_sampler
@pytest.mark.parametrize("steps", [0, 1, 50])
def test_reloaded_it_goes_on_with_the_very_same_draws(name, steps, tmp_path):
    """Also between two renewals of the density: 50 is not a multiple of 20."""

    def train(sampler, steps):
        for _ in range(steps):
            timesteps = sampler.sample(32).timesteps
            sampler.update(timesteps, falling_loss(1000)[timesteps] + timesteps % 7)
        return sampler

    def fresh(seed):
        return make_timestep_sampler(scheduler(), timestep_sampler=name, images=random_images(), seed=seed)

    saved = train(adapt(fresh(5)) if steps else fresh(5), steps)
    torch.save(saved.state_dict(), tmp_path / "sampler.pt")
    loaded = fresh(0)
    loaded.load_state_dict(torch.load(tmp_path / "sampler.pt"))
    for _ in range(3):
        assert_same_state(state_bits(saved), state_bits(loaded))
        assert torch.equal(saved.weights, loaded.weights)
        for a, b in zip(saved.sample(16), loaded.sample(16), strict=True):
            assert torch.equal(a, b)
        train(saved, 15)
        train(loaded, 15)


@every_sampler
def test_a_saved_state_is_a_snapshot(name):
    sampler = make_adapted(name)
    state = sampler.state_dict()
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}
    other = make_adapted(name)
    other.load_state_dict(state)
    for owner in (sampler, other):
        owner.sample(8)
        owner.update(torch.arange(1000), torch.ones(1000))
        adapt(owner, torch.ones(1000))
    assert_same_state(state, before)


@every_sampler
def test_a_state_of_another_kind_or_length_is_refused_by_name(name):
    sampler = make_adapted(name)
    before = state_bits(sampler)
    other = "uniform" if name != "uniform" else "adaptive"
    with pytest.raises(ValueError, match=TIMESTEP_SAMPLERS[other].__name__):
        sampler.load_state_dict(make_adapted(other).state_dict())
    with pytest.raises(ValueError, match=r"num_train_timesteps is 4000"):
        sampler.load_state_dict(make_adapted(name, T=4000).state_dict())
    assert_same_state(state_bits(sampler), before)


@every_sampler
def test_accelerate_checkpoints_it(name, tmp_path):
    accelerator, sampler = Accelerator(cpu=True), make_adapted(name)
    accelerator.register_for_checkpointing(sampler)
    sampler.sample(8)
    sampler.update(torch.arange(10), torch.ones(10))
    accelerator.save_state(tmp_path)
    expected, next_draws = state_bits(sampler), draws(sampler, 8, 3)
    adapt(sampler, torch.rand(1000))
    accelerator.load_state(tmp_path)
    assert_same_state(state_bits(sampler), expected)
    assert torch.equal(draws(sampler, 8, 3), next_draws)
