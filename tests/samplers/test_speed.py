"""SpeeD's sampler against its algorithm, one timestep at a time."""

import numpy as np
import pytest
from diffusers import DDPMScheduler
from sampler_helpers import alphas_cumprod, draws, every_converging_schedule, make_adapted

from samplers import make_timestep_sampler


def speed_by_hand(schedule, T, k=5, ceiling=0.6):
    """(tau, [T] density, [T] weights) from ALGORITHM.md's row, one timestep at a time."""
    abar = alphas_cumprod(schedule, T)
    slope = np.gradient(np.sqrt(1 - abar))
    tau = T
    while slope[tau - 1] < 0.1 / T:
        tau -= 1
    drawn = np.array([k if t < tau else 1.0 for t in range(T)])
    drawn /= drawn.sum()
    density = drawn / 2
    for t in range(T):
        density[tau - t if t < tau else t - tau] += drawn[t] / 2
    change = np.gradient(1 - abar)
    low, high = min(change[:tau]), max(change[:tau])
    weights = [(1 - ceiling) + (2 * ceiling - 1) * (change[t] - low) / (high - low) if t < tau else 1 for t in range(T)]
    return tau, density, np.array(weights)


@every_converging_schedule
def test_speed_by_hand(schedule, T):
    tau, density, weights = speed_by_hand(schedule, T)
    sampler = make_adapted("speed", schedule, T, "change_aware")
    np.testing.assert_allclose(sampler.probabilities, density, rtol=1e-4)
    np.testing.assert_allclose(sampler.relative_weights(), weights, rtol=1e-5)
    assert sampler.relative_weights()[:tau].min() == pytest.approx(0.4)
    assert sampler.relative_weights()[:tau].max() == pytest.approx(0.6)
    assert (sampler.relative_weights()[tau:] == 1).all()


def test_speeds_boundary_on_ddpms_own_schedule():
    """Where d sqrt(1 - abar) / dt falls under 1e-4; the paper says about 700."""
    tau = int((make_adapted("speed", weighting="change_aware").relative_weights() != 1).nonzero().max()) + 1
    assert tau == speed_by_hand("linear", 1000)[0]
    assert 600 < tau < 750


def test_speed_refuses_a_schedule_that_hardly_adds_noise():
    flat = DDPMScheduler(num_train_timesteps=50, beta_start=1e-7, beta_end=1e-7)
    with pytest.raises(ValueError, match="speed"):
        make_timestep_sampler(flat, timestep_sampler="speed", loss_weighting="none", error_filter="none")


def test_speed_draws_come_in_mirrored_pairs():
    sampler = make_adapted("speed", low_discrepancy=False)
    for timesteps in draws(sampler, 32, 5):
        left = sorted(timesteps.tolist())
        mirrors = [641 - t if t < 641 else t - 641 for t in left]
        assert sum(left.count(m) > 0 for m in mirrors) >= 16  # a drawn t's mirror is there; a mirror's may not be


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_speed_mirrors_keep_their_share_in_odd_batches(batch_size, low_discrepancy):
    sampler = make_adapted("speed", low_discrepancy=low_discrepancy)
    num_batches = 12000 // batch_size
    above = (draws(sampler, batch_size, num_batches) >= 641).double().mean()
    # Above tau = 641: 359 of 5 * 641 + 359 shares in the drawn half; in the mirrored one, t = 0 alone lands there.
    expected = (359 + 5) / (5 * 641 + 359) / 2
    assert abs(float(above) - expected) < 5 * (2 * expected / 12000) ** 0.5
