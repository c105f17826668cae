"""In place of diffusers' function, and with losses of the training loop's own."""

import inspect

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, training_utils
from sampler_helpers import (
    adapt,
    assert_same_state,
    every_sampler,
    falling_loss,
    make_adapted,
    make_sampler,
    scheduler,
    total_variation,
)

from samplers import METHODS, make_timestep_sampler
from samplers.base import warn_of_unused_filter
from samplers.schedule import NoiseSchedule

NONE = {"loss_weighting": "none", "error_filter": "none"}


def test_the_signature_is_that_of_diffusers():
    theirs = inspect.signature(training_utils.compute_density_for_timestep_sampling).parameters
    ours = inspect.signature(make_sampler("uniform").compute_density_for_timestep_sampling).parameters
    assert list(ours) == list(theirs)
    assert {name: ours[name].default for name in ours} == {name: theirs[name].default for name in theirs}


@every_sampler
def test_the_scripts_indices_are_the_timesteps_drawn(name):
    sampler, reference = make_adapted(name), make_adapted(name)
    for scheme in ("logit_normal", "mode", "none"):
        u = sampler.compute_density_for_timestep_sampling(scheme, 16, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
        assert u.dtype == torch.float32
        assert u.shape == (16,)
        indices = (u * 1000).long()
        drawn = reference.sample(16)
        assert torch.equal(indices, drawn.timesteps)
        assert torch.equal(sampler.weights_of(indices), drawn.weights)


@pytest.mark.parametrize("T", [2, 3, 50, 1000, 4000, 100_000])
def test_no_index_is_lost_to_rounding(T):
    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, T, dtype=torch.float64))
    sampler = make_timestep_sampler(schedule, "ddpm")
    u = sampler.compute_density_for_timestep_sampling("none", T)
    assert torch.equal((u * T).long().sort().values, torch.arange(T))  # equally spaced draws: each once
    assert 0 <= float(u.min()) <= float(u.max()) < 1


def test_a_generator_decides_the_draws():
    sampler = make_adapted("adaptive")
    of_seed_1 = [
        sampler.compute_density_for_timestep_sampling("none", 64, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(*of_seed_1)
    assert not torch.equal(of_seed_1[0], sampler.compute_density_for_timestep_sampling("none", 64))


@pytest.mark.parametrize("noise_scheduler", [scheduler(), FlowMatchEulerDiscreteScheduler()], ids=["ddpm", "flow"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_the_draws_also_after_the_density_has_changed(method, noise_scheduler):
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sampler = make_timestep_sampler(noise_scheduler, method, images=images)
    if method == "kim":
        sampler.sample(16, images=images)
    for _ in range(50):
        drawn = sampler.sample(500)
        sampler.update(drawn.timesteps, falling_loss(1000)[drawn.timesteps])
        assert torch.equal(sampler.weights_of(drawn.timesteps), drawn.weights)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_own_losses_are_the_samplers_but_for_the_filter(prediction_type):
    sampler = make_timestep_sampler(scheduler(), prediction_type=prediction_type, **NONE)
    errors, timesteps = torch.randn(1000, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(1000)
    own = sampler.losses_from(errors.square().mean((1, 2, 3)), timesteps)
    torch.testing.assert_close(own, sampler.losses(errors, timesteps), rtol=1e-5, atol=0)


def test_that_the_filter_has_no_part_in_own_losses_is_said_once(caplog):
    warn_of_unused_filter.cache_clear()
    for error_filter in ("none", "wiener_ode"):
        sampler, t = make_sampler("adaptive", error_filter=error_filter), torch.arange(8)
        caplog.clear()
        for _ in range(2):
            sampler.losses_from(torch.ones(8), t)
        assert caplog.text.count("error filter WienerFilter has no part") == (error_filter != "none")


def test_own_losses_of_the_velocity_train_the_loops_own_objective_by_the_best_density():
    """With the weighting `flow`, the plain mean of the velocity's squared errors; p ∝ sqrt(E[them])."""
    noise_scheduler = FlowMatchEulerDiscreteScheduler()
    options = {"loss_weighting": "flow", "error_filter": "none", "uniform_fraction": 1e-3}
    sampler = make_timestep_sampler(noise_scheduler, "adaptive", **options)
    t, own = torch.arange(1000), falling_loss(1000)
    adapt(sampler, sampler.losses_from(own, t))
    # At the noisy end, too, where the loss of epsilon falls to 0 within a few timesteps
    assert total_variation(sampler.probabilities.flip(0), own.sqrt() / own.sqrt().sum()) < 5e-3
    sampler.sample(1)
    contributions = sampler.probabilities.flip(0) * sampler.weights_of(t) * sampler.losses_from(own, t)
    torch.testing.assert_close(contributions[1:], own[1:] / 1000, rtol=2e-3, atol=0)


def test_what_a_loop_has_not_drawn_has_no_weights():
    for asked in (
        lambda sampler: sampler.weights_of(torch.arange(4)),
        lambda sampler: sampler.update(torch.arange(4), torch.ones(4)),
    ):
        with pytest.raises(ValueError, match="before any `sample`: timesteps must be those that this sampler has"):
            asked(make_sampler("adaptive"))


def test_a_restored_sampler_has_drawn():
    saved, loaded = (make_sampler("adaptive", "bell") for _ in range(2))
    adapt(saved)
    loaded.load_state_dict(saved.state_dict())
    t = saved.sample(8).timesteps
    assert torch.equal(loaded.weights_of(t), saved.weights_of(t))
    loaded.update(t, torch.ones(8))


CALLS = {
    "losses": lambda sampler, timesteps, count: sampler.losses(torch.zeros(count, 1, 8, 8), timesteps),
    "losses_of_epsilon": lambda sampler, timesteps, count: sampler.losses_of_epsilon(
        torch.zeros(count, 1, 8, 8), timesteps
    ),
    "losses_from": lambda sampler, timesteps, count: sampler.losses_from(torch.zeros(count), timesteps),
    "update": lambda sampler, timesteps, count: sampler.update(timesteps, torch.zeros(count)),
}


@pytest.mark.parametrize("call", [*CALLS, "weights_of"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.uint8])
def test_noise_levels_are_not_taken_for_indices(call, dtype):
    """999.0 and sigma * 1000 are what a flow's network is given; bytes would be taken for a mask."""
    sampler = make_adapted("adaptive")
    ask = CALLS.get(call, lambda sampler, timesteps, count: sampler.weights_of(timesteps))
    with pytest.raises(ValueError, match=rf"timesteps must be integers in \[0, 1000\).* not {dtype}"):
        ask(sampler, torch.tensor([1, 1, 0, 0]).to(dtype), 4)
    state = sampler.state_dict()["pending"]
    assert torch.equal(state, make_adapted("adaptive").state_dict()["pending"])


@pytest.mark.parametrize("call", CALLS)
def test_another_batchs_are_refused(call):
    sampler = make_adapted("adaptive")
    with pytest.raises(ValueError, match=r"must be \[4(, \.\.\.)?\], of the examples of the timesteps, not \[3"):
        CALLS[call](sampler, torch.arange(4), 3)
    with pytest.raises(ValueError, match=r"timesteps must be \[B\], one for each example, not \[4, 1\]"):
        CALLS[call](sampler, torch.arange(4)[:, None], 4)


@pytest.mark.parametrize("call", [*CALLS, "weights_of"])
@pytest.mark.parametrize("noise_scheduler", [scheduler(), FlowMatchEulerDiscreteScheduler()], ids=["ddpm", "flow"])
@pytest.mark.parametrize("bad", [-1, 1000])
def test_indices_of_no_timestep_are_refused(bad, noise_scheduler, call):
    """Also where [-1] would be taken for the last."""
    sampler = make_timestep_sampler(noise_scheduler, "adaptive", **NONE)
    sampler.sample(4)
    ask = CALLS.get(call, lambda sampler, timesteps, count: sampler.weights_of(timesteps))
    with pytest.raises(ValueError, match=r"timesteps must be integers in \[0, 1000\) .*: one is outside"):
        ask(sampler, torch.tensor([0, 999, 5, bad]), 4)
    assert sampler.state_dict()["pending"].sum() == 0


def test_means_over_the_batch_and_losses_of_pixels_are_refused():
    sampler = make_adapted("adaptive")
    for losses in (torch.tensor(0.1), torch.ones(4, 1, 8, 8), torch.ones(4, 1)):
        with pytest.raises(ValueError, match=r"^losses must be \[4\]"):
            sampler.update(torch.arange(4), losses)
    with pytest.raises(ValueError, match=r"^errors must be \[4, \.\.\.\]"):
        sampler.losses(torch.ones(4), torch.arange(4))


@every_sampler
def test_int32_will_do(name):
    """As OneTrainer's timesteps are."""
    sampler, reference = make_adapted(name), make_adapted(name)
    t = reference.sample(8).timesteps
    sampler.sample(8)
    for each, timesteps in ((sampler, t.int()), (reference, t)):
        each.update(timesteps, each.losses(torch.ones(8, 1, 8, 8), timesteps))
    assert torch.equal(sampler.weights_of(t.int()), reference.weights_of(t))
    assert_same_state(sampler.state_dict(), reference.state_dict())
