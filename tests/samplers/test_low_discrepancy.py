"""Equally spaced draws through the inverse CDF: the stated density, far more closely than independent draws have it."""

import pytest
import torch
from sampler_helpers import allowed, chi_square, draws, make_adapted


def cumulative_counts(timesteps, T):
    """[K, T] how many of the K batches' draws [K, B] are <= t."""
    every_t = torch.arange(T).expand(len(timesteps), T).contiguous()
    return torch.searchsorted(timesteps.sort(1).values, every_t, right=True)


@pytest.mark.parametrize(("batch_size", "num_batches"), [(15, 100), (64, 100)])
@allowed
def test_low_discrepancy_draws_have_the_stated_density_far_more_closely(name, schedule, T, batch_size, num_batches):
    sampler = make_adapted(name, schedule, T)
    excess = cumulative_counts(draws(sampler, batch_size, num_batches), T).double()
    excess -= batch_size * sampler.probabilities.double().cumsum(0)
    halves = 2 if name == "speed" else 1
    # Equally spaced points: in every single batch, each interval [0, t] has its due number of draws to within one
    # (SpeeD: each mirrored half has; and one draw is dropped from an odd batch).
    assert excess.abs().max() < halves + (batch_size % 2 and name == "speed") + 0.01
    # and over many batches nothing is left but the rounding's own noise (independent draws: 0.9 sqrt(K B)).
    assert excess.sum(0).abs().max() < 2 * halves * num_batches**0.5


@pytest.mark.parametrize("batch_size", [1, 3])
@allowed
def test_small_low_discrepancy_batches_have_the_stated_density(name, schedule, T, batch_size):
    sampler = make_adapted(name, schedule, T)
    statistic, dof = chi_square(draws(sampler, batch_size, 1200), sampler.probabilities, per_bin=40)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


@allowed
def test_low_discrepancy_removes_most_of_the_variance_that_t_adds(name, schedule, T):
    sampler = make_adapted(name, schedule, T)
    table = torch.cos(2 * torch.arange(T) / T).double()
    p = sampler.probabilities.double()
    independent = (p * (table - p @ table) ** 2).sum() / 64
    assert table[draws(sampler, 64, 100)].mean(1).var() < 0.15 * independent  # most for `laplace`, by its long tails


@pytest.mark.parametrize("name", ["uniform", "log_normal", "adaptive"])
def test_rounding_never_draws_from_farther_out_in_the_tail_than_the_last_point(name):
    """Of n equally spaced points the last is (n - 1 + offset) / n: it must not be rounded to 1, which is no draw."""
    n, seed = 2**22, 19
    (offset,) = torch.rand(1, generator=torch.Generator().manual_seed(seed)).double()
    assert 0.5 < offset < 0.99
    sampler = make_adapted(name, T=4000)
    farthest = sampler.sample(n, torch.Generator().manual_seed(seed)).timesteps.max()
    assert sampler.probabilities[farthest:].double().sum() * n > 0.9 * (1 - offset)
