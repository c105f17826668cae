"""CLTS: from uniform to a Gaussian over as many updates as published."""

import numpy as np
import pytest
import torch
from sampler_helpers import T, make_sampler
from scipy import stats


@pytest.mark.parametrize(("n", "share"), [(0, 0.0), (400, 0.4), (1000, 1.0), (5000, 1.0)])
def test_clts_moves_from_uniform_to_a_gaussian(n, share):
    sampler = make_sampler("clts", num_updates=1000)
    sampler.num_draws = n
    sampler.sample(8)
    gaussian = stats.norm.pdf(np.arange(T), loc=300, scale=300)
    expected = (1 - share) / T + share * gaussian / gaussian.sum()
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-5)
    assert (sampler.relative_weights() == 1).all()


def test_clts_takes_as_many_updates_as_published_and_goes_on_after_a_reload():
    sampler = make_sampler("clts")
    sampler.num_draws = 25_049
    loaded = make_sampler("clts", seed=4)
    loaded.load_state_dict(sampler.state_dict())
    for _ in range(60):
        assert torch.equal(sampler.sample(8).timesteps, loaded.sample(8).timesteps)
    assert torch.equal(sampler.probabilities, loaded.probabilities)
    halfway = sampler.probabilities[-1] * T
    assert 0.4 < float(halfway) < 0.7  # the noisiest is drawn less and less often


@pytest.mark.parametrize(
    "option", [{"mu": 300}, {"sigma": 0.0}, {"sigma": -0.1}, {"num_updates": 0}, {"refresh_every": 0}]
)
def test_what_makes_no_density_is_refused_by_name(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be "):
        make_sampler("clts", **option)
