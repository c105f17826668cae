"""SpeeD's sampler against its algorithm, one timestep at a time."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from sampler_helpers import alphas_cumprod, chi_square, draws, every_converging_schedule, make_adapted, tables

from samplers import NoiseSchedule, make_timestep_sampler
from samplers.speed import boundaries


def speed_by_hand(schedule, T, k=5, ceiling=0.6):
    """(tau, [T] density, [T] weights) of the paper's rule, one timestep at a time; on DDPM's of the authors' code."""
    abar = alphas_cumprod(schedule, T)
    slope = np.gradient(np.sqrt(1 - abar))
    if (schedule, T) == ("linear", 1000):
        tau, mirror = 700, int(np.argmax(slope < 1e-4)) + 1
    else:
        tau = T
        while slope[tau - 1] < 0.1 / T:
            tau -= 1
        mirror = tau
    drawn = np.array([k if t < tau else 1.0 for t in range(T)])
    drawn /= drawn.sum()
    density = drawn / 2
    for t in range(T):
        density[mirror - t if t < mirror else t - mirror] += drawn[t] / 2
    change = np.gradient(1 - abar)
    low, high = min(change), max(change)
    weights = [(1 - ceiling) + (2 * ceiling - 1) * (change[t] - low) / (high - low) if t < tau else 1 for t in range(T)]
    return tau, density, np.array(weights)


@every_converging_schedule
def test_speed_by_hand(schedule, T):
    tau, density, weights = speed_by_hand(schedule, T)
    sampler = make_adapted("speed", schedule, T, "change_aware")
    np.testing.assert_allclose(sampler.probabilities, density, rtol=1e-4)
    np.testing.assert_allclose(sampler.relative_weights(), weights, rtol=1e-5)
    assert sampler.relative_weights()[:tau].max() == pytest.approx(0.6)
    assert (sampler.relative_weights()[tau:] == 1).all()


def test_on_ddpms_own_schedule_the_boundaries_are_those_of_the_authors_code():
    assert boundaries(tables(), "a test") == (700, 642)
    nearly = NoiseSchedule.from_scheduler(DDPMScheduler(beta_start=1e-4, beta_end=0.0195))
    tau, mirror = boundaries(nearly, "a test")
    assert 600 < tau == mirror < 700  # the paper's rule


def test_speed_against_draws_as_the_authors_make_them():
    """Of a weighted choice of timesteps, and their mirror images behind them, as many are kept as the batch has."""
    generator, n = torch.Generator().manual_seed(0), 100_000
    shares = torch.tensor([5.0] * 700 + [1.0] * 300)
    t = torch.multinomial(shares / shares.sum(), n, replacement=True, generator=generator)
    t = torch.cat([t, torch.where(t < 642, 642 - t, t - 642)])
    statistic, dof = chi_square(t, make_adapted("speed").probabilities)
    assert statistic / 2 < dof + 5 * (2 * dof) ** 0.5  # a t and its mirror image are one draw


def test_speed_refuses_a_schedule_that_hardly_adds_noise():
    flat = DDPMScheduler(num_train_timesteps=50, beta_start=1e-7, beta_end=1e-7)
    with pytest.raises(ValueError, match="speed"):
        make_timestep_sampler(flat, timestep_sampler="speed", loss_weighting="none", error_filter="none")


def test_speed_draws_come_in_mirrored_pairs():
    sampler = make_adapted("speed", low_discrepancy=False)
    for timesteps in draws(sampler, 32, 5):
        left = sorted(timesteps.tolist())
        mirrors = [642 - t if t < 642 else t - 642 for t in left]
        assert sum(left.count(m) > 0 for m in mirrors) >= 16  # a drawn t's mirror is there; a mirror's may not be


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_speed_mirrors_keep_their_share_in_odd_batches(batch_size, low_discrepancy):
    sampler = make_adapted("speed", low_discrepancy=low_discrepancy)
    num_batches = 12000 // batch_size
    above = (draws(sampler, batch_size, num_batches) >= 643).double().mean()  # where no mirror image is
    expected = (57 * 5 + 300) / (700 * 5 + 300) / 2
    assert abs(float(above) - expected) < 5 * (2 * expected / 12000) ** 0.5


def test_speed_goes_on_with_the_boundaries_that_it_began_with():
    """Weights and density of an earlier version changed at 641, which is the paper's rule; then at the authors' 700."""
    saved, loaded = make_adapted("speed", k=3.0), make_adapted("speed")
    state = saved.state_dict() | {"tau": 641, "mirror": 641}
    loaded.load_state_dict(state)
    drawn = torch.tensor([3.0] * 641 + [1.0] * 359) / (3 * 641 + 359)
    density = drawn / 2
    for t in range(1000):
        density[641 - t if t < 641 else t - 641] += drawn[t] / 2
    torch.testing.assert_close(loaded.probabilities, density)
    assert (draws(loaded, 1000, 10) >= 642).double().mean() == pytest.approx(float(density[642:].sum()), abs=0.01)
    again = make_adapted("speed")
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.probabilities, loaded.probabilities)


def test_speed_refuses_a_state_that_does_not_say_where_its_density_changed():
    state = {name: value for name, value in make_adapted("speed").state_dict().items() if name not in ("tau", "mirror")}
    with pytest.raises(ValueError, match="of an earlier version, without tau, mirror"):
        make_adapted("speed").load_state_dict(state)
