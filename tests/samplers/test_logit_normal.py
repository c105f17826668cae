"""Stable Diffusion 3's logit-normal density by noise level, in closed form and against draws as it makes them."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from sampler_helpers import (
    assert_drawn_from,
    every_schedule_with_signal,
    log_sigma_edges,
    make_adapted,
    nearest_timesteps,
)


@every_schedule_with_signal
@pytest.mark.parametrize(("m", "s"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_density_of_the_flows_time(schedule, T, m, s):
    """The paper's density of time (eq. 19), times the time that a timestep's noise levels take in the flow."""
    time = 1 / (1 + np.exp(-log_sigma_edges(schedule, T)))
    fine = np.linspace(time[:-1], time[1:], 65)  # of each timestep's stretch
    density = np.exp(-((np.log(fine / (1 - fine)) - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))
    mass = np.trapezoid(density / (fine * (1 - fine)), fine, axis=0)
    p = make_adapted("logit_normal", schedule, T, m=m, s=s).probabilities
    np.testing.assert_allclose(p, mass / mass.sum(), rtol=2e-3, atol=1e-7)
    assert float(p.min()) > 0


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_logit_normal_against_draws_as_diffusers_makes_them(schedule):
    generator = torch.Generator().manual_seed(0)
    time = compute_density_for_timestep_sampling("logit_normal", 200000, 0.0, 1.0, generator=generator).double()
    assert_drawn_from(
        make_adapted("logit_normal", schedule).probabilities, nearest_timesteps(time.logit(), schedule, 1000)
    )
