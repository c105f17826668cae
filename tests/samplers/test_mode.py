"""SD3's mode sampling, and uniform draws of a straight flow's time, against draws as diffusers makes them."""

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from sampler_helpers import (
    assert_drawn_from,
    every_schedule_with_signal,
    log_sigma_edges,
    make_adapted,
    make_sampler,
    nearest_timesteps,
)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("scheme", "name"), [("mode", "mode"), ("none", "uniform_flow")])
def test_against_draws_as_diffusers_makes_them(scheme, name, schedule):
    generator = torch.Generator().manual_seed(0)
    time = compute_density_for_timestep_sampling(scheme, 200000, mode_scale=1.29, generator=generator).double()
    assert_drawn_from(make_adapted(name, schedule).probabilities, nearest_timesteps(time.logit(), schedule, 1000))


@every_schedule_with_signal
@pytest.mark.parametrize("mode_scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_inverts_the_papers_function(schedule, T, mode_scale):
    """Of a fine grid over u, the shares that fall on each timestep."""
    u = np.linspace(0, 1, 1_000_001)
    time = 1 - u - mode_scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    edges = 1 / (1 + np.exp(-log_sigma_edges(schedule, T)))
    mass = np.diff(1 - np.interp(edges, time[::-1], u[::-1]))
    p = make_adapted("mode", schedule, T, mode_scale=mode_scale).probabilities
    np.testing.assert_allclose(p, mass / mass.sum(), rtol=1e-3, atol=1e-7)


@every_schedule_with_signal
def test_uniform_flow_is_the_time_that_a_timesteps_noise_levels_take(schedule, T):
    sigma = np.exp(log_sigma_edges(schedule, T))
    mass = np.diff(sigma / (1 + sigma))
    p = make_adapted("uniform_flow", schedule, T).probabilities
    np.testing.assert_allclose(p, mass / mass.sum(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mode_scale", [-1.1, 1.8])
def test_a_mode_scale_beyond_the_papers_range_is_refused(mode_scale):
    with pytest.raises(ValueError, match=f"mode_scale must be in .-1, 1.752., not {mode_scale}"):
        make_sampler("mode", mode_scale=mode_scale)
