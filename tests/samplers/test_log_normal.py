"""EDM's log-normal density, against the normal distribution and EDM's own draws."""

import numpy as np
import pytest
import torch
from sampler_helpers import (
    alphas_cumprod,
    chi_square,
    every_schedule,
    every_schedule_with_signal,
    log_sigma_edges,
    make_adapted,
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
    edges = log_sigma_edges(schedule, T)
    inside = log_sigma[(log_sigma > edges[0]) & (log_sigma < edges[-1])]
    grid = 0.5 * np.log(1 / alphas_cumprod(schedule, T) - 1)
    after = np.searchsorted(grid, inside).clip(1, T - 1)
    nearest = np.where(inside - grid[after - 1] < grid[after] - inside, after - 1, after)
    statistic, dof = chi_square(torch.from_numpy(nearest), make_adapted("log_normal", schedule, T).probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


@every_schedule_with_signal
def test_log_normals_floor_hardly_moves_edms_objective(schedule, T):
    sampler = make_adapted("log_normal", schedule, T, "edm")
    c = weightings.edm(tables(schedule, T))
    mass = torch.from_numpy(normal_mass(schedule, T))
    objective, papers = sampler.probabilities.double() * sampler.relative_weights().double(), mass / mass.sum() * c
    assert float((objective - papers).abs().sum() / papers.sum()) < 0.01
