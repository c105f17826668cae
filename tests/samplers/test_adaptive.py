"""The adaptive sampler: it learns p_t ∝ c_t sqrt(L_t) from noisy losses, follows it, and pairs the noise."""

import pytest
import torch
from diffusers import DDPMScheduler
from sampler_helpers import (
    T,
    adapt,
    assert_same_state,
    begin,
    falling_loss,
    residual_loss,
    scheduler,
    state_bits,
    tables,
    total_variation,
    uniform_density,
)

from samplers import epsilon_loss_scale, make_timestep_sampler
from samplers.adaptive import sums_of_nearest


def adaptive(weighting="bell", **options):
    return make_timestep_sampler(scheduler(), "adaptive", loss_weighting=weighting, error_filter="none", **options)


def train(sampler, mean_loss, epochs, batch_size=500, seed=0):
    """Draw as many timesteps as `epochs` times T and report losses of that mean, as spread as squares are (chi^2_4)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(int(epochs * T) // batch_size):
        timesteps = sampler.sample(batch_size).timesteps
        noise = torch.randn(4, batch_size, generator=generator).square().mean(0)
        sampler.update(timesteps, mean_loss[timesteps] * noise)
    return sampler


def optimum(sampler, mean_loss):
    """p_t = (1 - f) c_t sqrt(L_t) / sum + f / T."""
    best = sampler.loss_weights.double() * mean_loss.double().sqrt()
    return (1 - sampler.uniform_fraction) * best / best.sum() + sampler.uniform_fraction / T


@pytest.mark.parametrize("weighting", ["none", "bell", "min_snr", "p2"])
@pytest.mark.parametrize("uniform_fraction", [0.1, 0.5])
def test_density_converges_to_the_optimum(weighting, uniform_fraction):
    sampler = train(adaptive(weighting, uniform_fraction=uniform_fraction), falling_loss(T), epochs=60)
    target = optimum(sampler, falling_loss(T))
    assert total_variation(sampler.probabilities, target) < 0.03
    assert total_variation(sampler.probabilities, target) < 0.2 * total_variation(uniform_density(), target)
    assert sampler.probabilities.min() > 0.99 * uniform_fraction / T
    assert float((sampler.probabilities / target).log().abs().max()) < 0.35  # nowhere far off either


def test_expected_loss_estimates_the_mean_not_the_mean_square():
    """IDDPM's sqrt(E[l^2]) would be sqrt(1.5) times as large for these losses."""
    sampler = train(adaptive("none"), falling_loss(T), epochs=60)
    ratio = sampler.expected_loss() / falling_loss(T)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert float(ratio.std()) < 0.15


def test_every_batch_size_and_refresh_interval_learns_the_same():
    for batch_size, refresh_every in ((50, 1), (64, 20), (1000, 7)):
        sampler = train(adaptive(refresh_every=refresh_every), falling_loss(T), epochs=40, batch_size=batch_size)
        assert total_variation(sampler.probabilities, optimum(sampler, falling_loss(T))) < 0.04


def relative_variance(sampler, mean_loss):
    """Of the gradient, sum_t c_t^2 G_t / p_t, over the least there is; G_t ∝ L_t."""
    c, G = sampler.loss_weights.double(), mean_loss.double()
    return float((c**2 * G / sampler.probabilities.double()).sum() / (c * G.sqrt()).sum() ** 2)


def test_it_begins_at_the_density_of_equal_losses():
    sampler = adaptive("bell")
    assert torch.allclose(sampler.probabilities, torch.tensor(1 / T))
    train(sampler, falling_loss(T), epochs=0.002, batch_size=2)
    equal = optimum(sampler, torch.ones(T))
    torch.testing.assert_close(sampler.probabilities.double(), equal, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 1), (4, 1), (1, 16), (4, 16)])
def test_it_learns_in_hundreds_of_draws_whatever_the_batches(batch_size, steps):
    """A steep loss: draws from equal losses' density make the gradient's variance 1.7 times the least there is."""
    loss = residual_loss().float()
    for seed in range(3):
        sampler = adaptive("none", gradient_accumulation_steps=steps, seed=seed)
        assert relative_variance(sampler, loss) > 1.7
        train(sampler, loss, epochs=0.4, batch_size=batch_size, seed=seed)
        early = relative_variance(sampler, loss)
        train(sampler, loss, epochs=10, batch_size=200, seed=seed)
        late = relative_variance(sampler, loss)
        assert early < late + 0.05, (seed, early, late)
        assert late < 1.05


def test_the_draws_nearest_to_a_timestep_are_counted_off_across_timesteps():
    """By hand: three draws at 0, none at 1, two at 2, four at 3; two on either side of each timestep's middle."""
    losses, draws = torch.tensor([6.0, 0.0, 2.0, 8.0]), torch.tensor([3.0, 0.0, 2.0, 4.0])
    near = sums_of_nearest(torch.stack([losses, draws]), share=0.0, least=2.0)
    # From -0.5 to 3.5 (of which 0 to 3.5), 1 to 5, 2 to 6, 5 to 9
    assert torch.equal(near[1], torch.tensor([3.5, 4.0, 4.0, 4.0]))
    assert torch.equal(near[0], torch.tensor([6.5, 6.0, 6.0, 8.0]))


def test_frozen_it_keeps_what_it_had_learned():
    learning, frozen = adaptive("none"), adaptive("none", learn_until=5.0)
    for sampler in (learning, frozen):
        train(sampler, falling_loss(T), epochs=20)
    first = frozen.probabilities.clone()
    assert total_variation(first, uniform_density()) > 0.1
    for sampler in (learning, frozen):
        train(sampler, falling_loss(T).flip(0), epochs=40)
    assert torch.equal(frozen.probabilities, first)
    assert total_variation(learning.probabilities, first) > 0.1


def test_it_follows_when_the_losses_change():
    before, after = falling_loss(T), falling_loss(T).flip(0)
    sampler = train(adaptive("none"), before, epochs=40)
    train(sampler, after, epochs=100, seed=1)
    assert total_variation(sampler.probabilities, optimum(sampler, after)) < 0.04


@pytest.mark.parametrize("memory", [0.2, 1.0])
def test_it_forgets_by_the_fraction_of_the_run(memory):
    """When the run has grown from n to m draws, (n / m)^(1 + 1 / memory) of what was known is left."""
    for epochs in (100, 400):
        sampler = adaptive("none", memory=memory, uniform_fraction=1.0, refresh_every=1)
        train(sampler, torch.ones(T), epochs=epochs)
        train(sampler, torch.zeros(T), epochs=epochs // 4)
        assert float(sampler.expected_loss().mean()) == pytest.approx(0.8 ** (1 + 1 / memory), abs=0.02)


@pytest.mark.parametrize("weighting", ["none", "bell", "min_snr"])
def test_gradient_variance_is_near_the_least_there_is(weighting):
    sampler = adaptive(weighting)
    uniform = relative_variance(sampler, falling_loss(T))
    train(sampler, falling_loss(T), epochs=60)
    learned = relative_variance(sampler, falling_loss(T))
    assert learned < 0.9 * uniform
    assert learned < 1.06


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_gradient_variance_is_near_the_least_there_is_whatever_the_network_predicts(beta_schedule, prediction_type):
    """G_t here is that of a network's output: of a random error of each timestep's size, by autograd."""
    schedule = tables(beta_schedule, T)
    scale = epsilon_loss_scale(schedule, prediction_type)[:, None]
    error = torch.randn(T, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error *= (falling_loss(T)[:, None] / scale).sqrt()
    output = error.requires_grad_()
    loss = (scale * output.square()).mean(1)
    G = torch.autograd.grad(loss.sum(), output)[0].square().sum(1)
    noise_scheduler = DDPMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type)
    options = {"loss_weighting": "bell", "error_filter": "none", "uniform_fraction": 0.01}
    sampler = train(make_timestep_sampler(noise_scheduler, **options), loss.detach().float(), epochs=60)
    c = sampler.loss_weights.double()
    least = float((c * G.sqrt()).sum() ** 2)
    assert float((c**2 * G / sampler.probabilities.double()).sum()) < 1.06 * least


def test_gradients_of_a_model_are_less_noisy_at_the_same_mean():
    """A linear model's own gradients, sampled: the same objective's mean gradient, with less variance."""
    generator = torch.Generator().manual_seed(0)
    scale = falling_loss(T).double().sqrt()
    sampler = adapt(adaptive("none"), falling_loss(T))

    def gradients(timesteps, weights):
        error = scale[timesteps] * (0.3 + torch.randn(len(timesteps), generator=generator, dtype=torch.float64))
        return weights * 2 * error  # d/dtheta of (theta + error)^2 at theta = 0

    t_uniform = torch.randint(T, (200000,), generator=generator)
    uniform = gradients(t_uniform, torch.ones(()))
    learned = gradients(*sampler.sample(200000))
    assert float(learned.mean()) == pytest.approx(float(uniform.mean()), abs=5 * float(uniform.std()) / 200000**0.5)
    assert learned.var() < 0.8 * uniform.var()


@pytest.mark.parametrize("uniform_fraction", [0.0, -0.1, 1.1])
def test_a_density_without_a_floor_is_refused(uniform_fraction):
    with pytest.raises(ValueError, match="uniform_fraction"):
        adaptive(uniform_fraction=uniform_fraction)


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan")])
def test_a_memory_of_nothing_is_refused(memory):
    with pytest.raises(ValueError, match="memory"):
        adaptive(memory=memory)


@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("batch_size", [64, 65])
def test_halves_of_a_batch_are_neighbours_in_t_and_in_random_order(batch_size, low_discrepancy):
    sampler = adapt(adaptive(low_discrepancy=low_discrepancy))
    pairs = batch_size // 2
    for _ in range(20):
        timesteps = sampler.sample(batch_size).timesteps
        first, second = timesteps[:pairs], timesteps[-pairs:]
        in_pairs = timesteps.sort().values.tolist()
        if batch_size % 2:
            in_pairs.remove(int(timesteps[pairs]))  # which has no neighbour
        in_pairs = torch.tensor(in_pairs).view(-1, 2)
        order = (torch.minimum(first, second) * T + torch.maximum(first, second)).argsort()
        assert torch.equal(torch.stack([first, second], 1)[order].sort(1).values, in_pairs)
        assert not torch.equal(first, first.sort().values)
        assert 0 < (first < second).sum() < pairs  # either half has the noisier one


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("noise_coupling", ["antithetic", "independent"])
def test_each_place_of_a_batch_has_the_density(noise_coupling, batch_size):
    """Also where what is at a place is not random, as in the batches of prior preservation."""
    sampler = adaptive(noise_coupling=noise_coupling)
    drawn = torch.stack([sampler.sample(batch_size).timesteps for _ in range(3000)])
    for place in drawn.T:
        shares = torch.histc(place.float(), 8, 0, T) / len(place)
        torch.testing.assert_close(shares, torch.full((8,), 1 / 8), atol=0.03, rtol=0)


def test_pairing_leaves_the_density_alone():
    paired, single = (adapt(adaptive(noise_coupling=name)) for name in ("antithetic", "independent"))
    for _ in range(5):
        drawn = [sampler.sample(100).timesteps.sort().values for sampler in (paired, single)]
        assert float((drawn[0] - drawn[1]).abs().double().mean()) < 10  # two offsets of the same strides


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_losses_are_left_out(bad):
    losses = falling_loss(T).repeat(2)
    timesteps = torch.arange(T).repeat(2)
    broken = torch.arange(2 * T) % 5 == 0
    clean, dirty = begin(adaptive()), begin(adaptive())
    for _ in range(40):
        clean.update(timesteps, torch.where(broken, float("nan"), losses))
        dirty.update(timesteps, torch.where(broken, bad, losses))
    assert_same_state(state_bits(clean), state_bits(dirty))
    assert total_variation(dirty.probabilities, optimum(dirty, falling_loss(T))) < 0.01


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_broken_losses_alone_leave_it_uniform_and_it_recovers(broken):
    sampler = adaptive()
    adapt(sampler, torch.full((T,), broken))
    assert sampler.probabilities.isfinite().all()
    assert sampler.sample(64).weights.isfinite().all()
    for _ in range(10):
        adapt(sampler)
    assert total_variation(sampler.probabilities, optimum(sampler, falling_loss(T))) < 0.02


def test_an_exploding_loss_does_not_poison_for_ever():
    """Finite losses whose sum is not: a run just before it diverges, which its user rolls back or clips."""
    sampler = adapt(adaptive())
    adapt(sampler, torch.full((T,), torch.finfo(torch.float32).max))
    assert sampler.probabilities.isfinite().all()
    assert sampler.sample(64).weights.isfinite().all()


def test_a_single_process_makes_no_collective(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **k: pytest.fail("a collective on one process"))
    assert total_variation(adapt(adaptive()).probabilities, uniform_density()) > 0.1
