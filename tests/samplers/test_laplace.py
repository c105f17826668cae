"""The Laplace log-SNR, against the distribution and the paper's noise schedule."""

import numpy as np
import pytest
import torch
from sampler_helpers import (
    assert_drawn_from,
    every_schedule_with_signal,
    log_sigma_edges,
    make_adapted,
    make_sampler,
    nearest_timesteps,
)
from scipy.stats import laplace


@every_schedule_with_signal
@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.0, 0.75)])
def test_laplace_density_of_the_log_snr(schedule, T, mu, b):
    log_snr = -2 * log_sigma_edges(schedule, T)
    mass = -np.diff(laplace.cdf(log_snr, loc=mu, scale=b))
    p = make_adapted("laplace", schedule, T, mu=mu, b=b).probabilities
    np.testing.assert_allclose(p, mass / mass.sum(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_laplace_against_uniform_draws_of_the_papers_noise_schedule(schedule):
    t = torch.rand(200000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_snr = 0 - 0.5 * torch.sign(0.5 - t) * torch.log(1 - 2 * (t - 0.5).abs())
    assert_drawn_from(make_adapted("laplace", schedule).probabilities, nearest_timesteps(-log_snr / 2, schedule, 1000))


@pytest.mark.parametrize("b", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(b):
    with pytest.raises(ValueError, match=f"b must be positive and finite, not {b}"):
        make_sampler("laplace", b=b)
