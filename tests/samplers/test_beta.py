"""B-TTDM's density, against the Beta distribution."""

import numpy as np
import pytest
import torch
from sampler_helpers import LENGTHS, assert_drawn_from, make_adapted, make_sampler
from scipy import stats


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("a", "b", "rtol"), [(0.8, 1.0, 1e-5), (1.0, 0.6, 1e-5), (0.5, 3.0, 6e-3), (2.0, 2.0, 4e-3)])
def test_beta_density(a, b, rtol, T):
    mass = np.diff(stats.beta.cdf(np.arange(T + 1) / T, a, b))
    p = make_adapted("beta", T=T, alpha=a, beta=b).probabilities
    np.testing.assert_allclose(p, mass, rtol=rtol, atol=1e-6)


def test_beta_against_draws():
    x = np.random.default_rng(0).beta(0.8, 1.0, 200000)
    assert_drawn_from(make_adapted("beta").probabilities, torch.from_numpy((x * 1000).astype(int)))


@pytest.mark.parametrize("option", [{"alpha": 0.0}, {"beta": -1.0}])
def test_beta_of_no_distribution_is_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, not"):
        make_sampler("beta", **option)
