"""Flow matching: the same samplers on a scheduler of sigmas, in its order, for a network that predicts the velocity."""

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from sampler_helpers import T, adapt, draws, falling_loss, images_of, total_variation
from scipy import stats

from samplers import METHODS, NoiseSchedule, Spectrum, WienerFilter, epsilon_loss_scale, make_timestep_sampler


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


def tables(**options):
    return NoiseSchedule.from_scheduler(flow(**options))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_noise_level_of_a_flow_is_its_ratio_of_noise_to_signal(shift):
    s = flow(shift=shift).sigmas.double().flip(0)[:-1]
    torch.testing.assert_close(tables(shift=shift).sigma[:-1], s / (1 - s), rtol=1e-9, atol=0)


def test_where_nothing_is_left_of_the_image_the_middle_to_the_neighbour_stands_for_it():
    assert float(flow().sigmas[0]) == 1
    assert float(tables().sigma[-1]) == pytest.approx(0.9995 / 0.0005, rel=1e-4)


def test_an_error_of_the_velocity_is_one_of_epsilon():
    """x = (1 - s) x_0 + s eps and u = eps - x_0 given: eps = x + (1 - s) u."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, T, 5, generator=generator, dtype=torch.float64)
    s = flow().sigmas.double().flip(0)[:, None]
    x, velocity = (1 - s) * x0 + s * eps, eps - x0 + 0.1 * error
    of_epsilon = (x + (1 - s) * velocity - eps).square()
    scale = epsilon_loss_scale(tables(), "flow")
    torch.testing.assert_close(scale[:-1, None] * (0.1 * error[:-1]).square(), of_epsilon[:-1], rtol=1e-6, atol=1e-15)


def test_draws_are_indices_into_the_schedulers_own_tables():
    """SD3's density by its sampler: logit(sigma) ~ N(0, 1)."""
    scheduler = flow()
    timesteps = draws(make_timestep_sampler(scheduler, "logit_normal"), 64, 200).flatten()
    sigmas = scheduler.sigmas[timesteps].double()
    assert stats.kstest(sigmas.logit().numpy(), "norm").statistic < 0.01
    assert scheduler.timesteps[timesteps].shape == (64 * 200,)


def test_what_is_learned_is_learned_of_the_timesteps_that_were_drawn():
    scheduler = flow()
    options = {"loss_weighting": "none", "error_filter": "none", "uniform_fraction": 0.01}
    sampler = make_timestep_sampler(scheduler, "adaptive", **options)
    adapt(sampler, falling_loss(T).flip(0))  # large at the last indices, where the image is clean
    s = scheduler.sigmas.double()
    target = ((1 - s).square() * falling_loss(T).flip(0)).sqrt()
    drawn = torch.bincount(draws(sampler, 1000, 50).flatten(), minlength=T).double()
    assert total_variation(drawn / drawn.sum(), target / target.sum()) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_flow(method):
    sampler = make_timestep_sampler(flow(), method, images=images_of(16))
    images = images_of(8)
    timesteps, weights = sampler.sample(8, images=images)
    losses = sampler.losses(torch.randn(8, 1, 8, 8), timesteps)
    sampler.update(timesteps, losses)
    assert (weights * losses).isfinite().all()
    mean_weight = sampler.probabilities * sampler.weights * epsilon_loss_scale(tables(), "flow")
    assert float(mean_weight.sum()) == pytest.approx(1, rel=1e-3)  # on the velocity's own loss


def test_the_plain_loss_of_the_velocity_is_uniform_with_the_weighting_flow():
    sampler = make_timestep_sampler(flow(), "ddpm", loss_weighting="flow")
    errors = torch.randn(T, 1, 4, 4)
    timesteps = torch.arange(T)
    weighted = sampler.weights.flip(0) * sampler.losses(errors, timesteps)
    torch.testing.assert_close(weighted, errors.square().mean((1, 2, 3)), rtol=2e-3, atol=0)


def test_the_filter_for_the_ode_counts_what_an_error_of_the_velocity_does_to_the_finished_image():
    """Of two components at the same noise, by diffusers' own steps with the perfect velocity for Gaussian data."""
    images = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3) / 8
    spectrum, scheduler = Spectrum.of(images), flow()
    chosen = [(0, 0), (0, 1), (2, 2)]
    variances = torch.stack([spectrum.variances[0][at] for at in chosen])
    at = [100, 400, 700, 900]

    def finished(error_at):
        scheduler.set_timesteps(T)
        x = torch.ones(1, 3, dtype=torch.float64)
        for i, t in enumerate(scheduler.timesteps):
            s = scheduler.sigmas[i].double()
            gain = ((s - (1 - s) * variances) / ((1 - s) ** 2 * variances + s**2)).double()  # E[eps - x_0 | x] / x
            x = scheduler.step(gain * x + 1.0 * (i == error_at), t, x).prev_sample.double()
        return x[0]

    undisturbed = finished(None)
    moved = torch.stack([finished(i) - undisturbed for i in at]).square()
    sampler = make_timestep_sampler(flow(), images=images, error_filter="wiener_ode")
    sampler.error_filter = WienerFilter(tables(), spectrum, plain_fraction=1e-9, exponent=1.0)
    counts = []
    for frequency in chosen:
        component = torch.zeros(1, 1, 8, 8, dtype=torch.complex128)
        component[0, 0, frequency[0], frequency[1]] = 1
        wave = torch.fft.ifft2(component, norm="ortho").real
        wave = (wave / wave.square().sum().sqrt()).float().expand(len(at), -1, -1, -1)
        counts.append(sampler.losses(wave, torch.tensor(at)))
    ours, theirs = (values / values.sum(1, keepdim=True) for values in (torch.stack(counts, 1).double(), moved))
    np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 0.5, 0.0], r"sigmas must be in \(0, 1\].*set_timesteps"),
        ([80.0, 1.0, 0.1], r"must be in \(0, 1\].*not 80"),
        ([0.1, 0.5, 0.9], "must fall"),
        ([1.0], "at least 2, not 1"),
    ],
)
def test_sigmas_that_are_no_flow_are_refused(sigmas, message):
    scheduler = flow()
    scheduler.sigmas = torch.tensor(sigmas)
    with pytest.raises(ValueError, match=message):
        make_timestep_sampler(scheduler, "ddpm")


def test_schedulers_of_sampling_and_of_another_process_are_refused():
    scheduler = flow()
    scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*set_timesteps"):
        make_timestep_sampler(scheduler, "ddpm")
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        make_timestep_sampler(EDMEulerScheduler(), "ddpm")
