"""Stable Diffusion 3's logit-normal density, in closed form and against draws as it makes them."""

import math

import numpy as np
import pytest
import torch
from sampler_helpers import T, chi_square, make_sampler


@pytest.mark.parametrize(("m", "s"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_density_in_t(m, s):
    t = (np.arange(T) + 0.5) / T
    density = np.exp(-((np.log(t / (1 - t)) - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi) * t * (1 - t))
    p = make_sampler("logit_normal", m=m, s=s).probabilities
    np.testing.assert_allclose(p[20:-20], density[20:-20] / T, rtol=3e-2, atol=1e-7)
    assert float(p.min()) > 0


def test_logit_normal_against_draws_as_stable_diffusion_3_makes_them():
    t = torch.sigmoid(torch.randn(200000, generator=torch.Generator().manual_seed(0)))
    statistic, dof = chi_square((t * T).long(), make_sampler("logit_normal").probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5
