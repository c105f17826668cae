"""The adaptive objective: where the loss falls with noise, by the closed form of Gaussian images."""

import pytest
import torch
from test_importance_sampler import total_variation, train
from test_samplers import LENGTHS, adapt, every_schedule, scheduler, tables

from samplers import make_timestep_sampler

COMPONENTS = torch.tensor([4.0, 1.0, 0.3, 0.1, 0.1]).double()  # standard deviations s_i
T = 1000


def adaptive(schedule="linear", length=T, **options):
    return make_timestep_sampler(scheduler(schedule, length), "adaptive", **options)


def gaussian_loss(sigma):
    """[T] the least epsilon-loss there is, mean_i s_i^2 / (s_i^2 + sigma^2)."""
    variance = COMPONENTS[:, None].square()
    return (variance / (variance + sigma.square())).mean(0)


def gaussian_objective(schedule, amplitude_power=0.0):
    """[T] sum_i s_i^q (s_i sigma / (s_i^2 + sigma^2))^2 dlog(sigma)/dt, of mean 1."""
    sigma, s = schedule.sigma, COMPONENTS[:, None]
    bumps = s**amplitude_power * (s * sigma / (s.square() + sigma.square())).square()
    objective = bumps.sum(0) * torch.gradient(sigma.log())[0]
    return objective / objective.mean()


def distance(objective, other):
    """Total variation between two objectives, as densities."""
    return total_variation(objective / objective.sum(), other / other.sum())


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_slope_gives_every_component_the_same_weight(schedule, length):
    sampler = adaptive(schedule, length, amplitude_power=0.0, bandwidth=0.1, floor=1e-6)
    tables_ = tables(schedule, length)
    adapt(sampler, gaussian_loss(tables_.sigma).float())
    assert distance(sampler.loss_weights, gaussian_objective(tables_)) < (0.03 if length > 50 else 0.1)


def test_a_power_of_the_amplitude_weighs_components_by_it():
    """s_i^q, nearly: sigma is about s_i under the bump of component i, and a little higher for the larger half."""
    schedule = tables()
    sampler = adapt(adaptive(amplitude_power=0.5), gaussian_loss(schedule.sigma).float())
    far = distance(gaussian_objective(schedule, 0.5), gaussian_objective(schedule))
    assert distance(sampler.loss_weights, gaussian_objective(schedule, 0.5)) < 0.6 * far


def test_it_is_learned_from_noisy_losses():
    loss = gaussian_loss(tables().sigma).float()
    exact, noisy = adapt(adaptive(), loss), train(adaptive(), loss, epochs=60)
    assert distance(noisy.loss_weights, exact.loss_weights) < 0.05
    best = noisy.loss_weights * loss.sqrt()
    target = 0.9 * best / best.sum() + 0.1 / T
    assert total_variation(noisy.probabilities, target) < 0.03


def test_it_moves_to_lower_noise_as_that_is_learned():
    """A network that so far tells noise from image at high noise only, then at low noise too."""
    sigma = tables().sigma
    early, late = ((s**2 / (s**2 + sigma.square())).float() for s in (5.0, 0.2))
    sampler = train(adaptive(), early, epochs=20)
    before = (sampler.loss_weights * torch.arange(T)).mean()
    train(sampler, late, epochs=100)
    assert (sampler.loss_weights * torch.arange(T)).mean() < 0.5 * before


def test_until_warmed_up_the_objective_is_the_loss_weighting():
    sampler = adaptive(warmup=5.0, loss_weighting="min_snr")
    assert torch.equal(sampler.loss_weights, make_timestep_sampler(scheduler(), "min_snr").loss_weights)
    train(sampler, torch.rand(T), epochs=4)
    assert torch.equal(sampler.loss_weights, make_timestep_sampler(scheduler(), "min_snr").loss_weights)
    assert torch.allclose(sampler.probabilities, torch.tensor(1 / T))


def test_where_the_loss_rises_only_the_floor_is_left():
    sampler = adapt(adaptive(floor=0.1), torch.linspace(0.1, 1.0, T))
    assert torch.allclose(sampler.loss_weights, torch.tensor(1.0))


@every_schedule
def test_the_objective_is_finite_positive_and_of_mean_one(schedule, T):
    sampler = adapt(adaptive(schedule, T), torch.rand(T, generator=torch.Generator().manual_seed(0)))
    assert sampler.loss_weights.isfinite().all()
    assert (sampler.loss_weights > 0).all()
    assert float(sampler.loss_weights.mean()) == pytest.approx(1, rel=1e-5)
    assert sampler.weights.isfinite().all()


@pytest.mark.parametrize("options", [{"bandwidth": 0.0}, {"floor": 0.0}, {"floor": 1.1}])
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        adaptive(**options)
