"""EDM's log-normal density, against the normal distribution and EDM's own draws."""

import numpy as np
import pytest
import torch
from sampler_helpers import (
    assert_drawn_from,
    every_schedule,
    every_schedule_with_signal,
    make_adapted,
    nearest_timesteps,
    normal_mass,
    tables,
)

from samplers import weightings


@every_schedule
def test_log_normal_density_against_the_normal_distribution(schedule, T):
    mass = normal_mass(schedule, T)
    np.testing.assert_allclose(
        make_adapted("log_normal", schedule, T).probabilities, mass / mass.sum(), rtol=2e-4, atol=1e-7
    )


@pytest.mark.parametrize(("schedule", "T"), [("linear", 1000), ("squaredcos_cap_v2", 1000), ("squaredcos_cap_v2", 50)])
def test_log_normal_density_against_edms_own_continuous_draws(schedule, T):
    log_sigma = np.random.default_rng(0).normal(-1.2, 1.2, 200000)
    assert_drawn_from(make_adapted("log_normal", schedule, T).probabilities, nearest_timesteps(log_sigma, schedule, T))


@every_schedule_with_signal
def test_log_normals_floor_hardly_moves_edms_objective(schedule, T):
    sampler = make_adapted("log_normal", schedule, T, "edm")
    c = weightings.edm(tables(schedule, T))
    mass = torch.from_numpy(normal_mass(schedule, T))
    objective, papers = sampler.probabilities.double() * sampler.relative_weights().double(), mass / mass.sum() * c
    assert float((objective - papers).abs().sum() / papers.sum()) < 0.01
