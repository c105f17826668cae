"""Every sampler's draws: in range, on the device, reproducible by seed, and of the stated density."""

import pytest
import torch
from sampler_helpers import allowed, chi_square, draws, every_sampler, make_adapted

from samplers import fold_seed


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("low_discrepancy", [True, False])
@allowed
def test_draws_are_timesteps_on_the_device(name, schedule, T, low_discrepancy, device):
    sampler = make_adapted(name, schedule, T, low_discrepancy=low_discrepancy, device=device)
    for batch_size in (1, 2, 7, 64):
        timesteps, weights = sampler.sample(batch_size)
        assert timesteps.shape == weights.shape == (batch_size,)
        assert timesteps.dtype == torch.int64
        assert weights.dtype == torch.float32
        assert timesteps.device.type == weights.device.type == device
        assert ((timesteps >= 0) & (timesteps < T)).all()
        assert torch.equal(weights, sampler.weights[timesteps])


@every_sampler
@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_a_seed_reproduces_the_draws_and_another_gives_others(name, low_discrepancy):
    a, b, c = (draws(make_adapted(name, low_discrepancy=low_discrepancy, seed=seed), 16, 5) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len({tuple(batch.tolist()) for batch in (*a, *c)}) == 10  # no batch is drawn twice


@every_sampler
def test_a_generator_of_the_users_own_decides_the_draws(name):
    sampler = make_adapted(name)
    first, second = (sampler.sample(16, torch.Generator().manual_seed(3)).timesteps for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sampler.sample(16, torch.Generator().manual_seed(4)).timesteps)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_adapted("adaptive").sample(8)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_of_a_run_never_collide():
    assert len({fold_seed(7, step) for step in range(10000)}) == 10000
    assert len({fold_seed(seed, step) for seed in range(10) for step in range(1000)}) == 10000
    assert len({fold_seed(7, step, stream) for step in range(1000) for stream in range(5)}) == 5000
    assert all(0 <= fold_seed(seed, 5) < 2**32 for seed in (0, 1, 2**31, 2**40))  # all that a CPU generator reads


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 1200), (15, 150), (64, 80)])
@allowed
def test_independent_draws_have_the_stated_density(name, schedule, T, batch_size, num_batches):
    sampler = make_adapted(name, schedule, T, low_discrepancy=False)
    statistic, dof = chi_square(draws(sampler, batch_size, num_batches), sampler.probabilities)
    pairs = 2 if name == "speed" and batch_size > 1 else 1  # SpeeD's draws come in dependent pairs
    assert statistic < pairs * (dof + 5 * (2 * dof) ** 0.5)
