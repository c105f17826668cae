"""The rival samplers against their papers' formulas: closed forms, and the published algorithms one step at a time."""

import math
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import results_of_two_ranks
from scipy import stats
from sklearn.feature_selection import SelectKBest, f_regression
from test_adaptive import total_variation, uniform_density
from test_samplers import (
    adapt,
    alphas_cumprod,
    assert_same_state,
    chi_square,
    draws,
    falling_loss,
    log_sigma_edges,
    no_host_sync,
    scheduler,
    state_bits,
    tables,
)

from samplers import METHODS, TIMESTEP_SAMPLERS, make_timestep_sampler, weightings
from samplers.info_noise import interpolate_missing
from samplers.kim import best_predictors, beta_parameters, beta_table, vlb_scale
from samplers.loss_aware import NOTHING, latest, push

torch.set_num_threads(1)
T = 1000
RIVALS = ("loss_second_moment", "uncertainty", "adaptive_log_snr", "info_noise")  # that learn from losses alone


def make(name, weighting="none", **options):
    options = {"error_filter": "none", **options}
    return make_timestep_sampler(scheduler(), timestep_sampler=name, loss_weighting=weighting, **options)


def squares(generator, *shape):
    """Losses of mean 1, as spread as a mean of four squares."""
    return torch.randn(4, *shape, generator=generator).square().mean(0)


# ------------------------------------------------------------------------------------------------------- logit-normal


@pytest.mark.parametrize(("m", "s"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_density_in_t(m, s):
    t = (np.arange(T) + 0.5) / T
    density = np.exp(-((np.log(t / (1 - t)) - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi) * t * (1 - t))
    p = make("logit_normal", m=m, s=s).probabilities
    np.testing.assert_allclose(p[20:-20], density[20:-20] / T, rtol=3e-2, atol=1e-7)
    assert float(p.min()) > 0


def test_logit_normal_against_draws_as_stable_diffusion_3_makes_them():
    t = torch.sigmoid(torch.randn(200000, generator=torch.Generator().manual_seed(0)))
    statistic, dof = chi_square((t * T).long(), make("logit_normal").probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


# --------------------------------------------------------------------------------------------------------------- CLTS


@pytest.mark.parametrize(("n", "share"), [(0, 0.0), (400, 0.4), (1000, 1.0), (5000, 1.0)])
def test_clts_moves_from_uniform_to_a_gaussian(n, share):
    sampler = make("clts", num_updates=1000)
    sampler.num_draws = n
    sampler.sample(8)
    gaussian = stats.norm.pdf(np.arange(T), loc=300, scale=300)
    expected = (1 - share) / T + share * gaussian / gaussian.sum()
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-5)
    assert (sampler.weights == 1).all()


def test_clts_takes_as_many_updates_as_published_and_goes_on_after_a_reload():
    sampler = make("clts")
    sampler.num_draws = 25_049
    loaded = make("clts", seed=4)
    loaded.load_state_dict(sampler.state_dict())
    for _ in range(60):
        assert torch.equal(sampler.sample(8).timesteps, loaded.sample(8).timesteps)
    assert torch.equal(sampler.probabilities, loaded.probabilities)
    halfway = sampler.probabilities[-1] * T
    assert 0.4 < float(halfway) < 0.7  # the noisiest is drawn less and less often


# ------------------------------------------------------------------------------------------------- loss-second-moment


def test_push_is_a_deque_for_each_row():
    generator = torch.Generator().manual_seed(0)
    history = torch.full((5, 4), NOTHING)
    deques = [deque(maxlen=4) for _ in range(5)]
    for batch_size in (1, 3, 30, 7, 0, 100, 2):
        rows = torch.randint(5, (batch_size,), generator=generator)
        values = torch.rand(batch_size, generator=generator)
        usable = torch.rand(batch_size, generator=generator) < 0.8
        history = push(history, rows, values, usable)
        for row, value in zip(rows[usable].tolist(), values[usable], strict=True):
            deques[row].append(value)
        for row, own in zip(history, deques, strict=True):
            assert row.tolist() == [NOTHING] * (4 - len(own)) + [float(value) for value in own]


def test_latest_keeps_the_order():
    n = NOTHING
    rows = torch.tensor([[n, 1, 2, n, n, 3], [n, n, n, n, n, n], [1, 2, 3, 4, 5, 6]])
    assert latest(rows, 3).tolist() == [[1, 2, 3], [n, n, n], [4, 5, 6]]


class ResamplerByHand:
    """IDDPM's resampler as its authors describe it, with lists."""

    def __init__(self):
        self.losses = [[] for _ in range(T)]

    def update(self, timesteps, losses):
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            self.losses[t] = [*self.losses[t], loss][-10:]

    def density(self):
        if min(map(len, self.losses)) < 10:
            return np.full(T, 1 / T)
        second_moment = np.array([np.mean(np.square(own)) for own in self.losses])
        return 0.999 * np.sqrt(second_moment) / np.sqrt(second_moment).sum() + 0.001 / T


@pytest.mark.parametrize("refresh_every", [1, 7])
def test_loss_second_moment_is_iddpms_resampler(refresh_every):
    generator = torch.Generator().manual_seed(0)
    sampler, by_hand = make("loss_second_moment", refresh_every=refresh_every), ResamplerByHand()
    warmed_up = 0
    for _ in range(126):
        timesteps = torch.randint(T, (400,), generator=generator)
        timesteps[:15] = timesteps[0]  # more than a history holds
        losses = falling_loss(T)[timesteps] * squares(generator, 400)
        by_hand.update(timesteps, losses)
        sampler.update(timesteps, losses)
        if sampler.updates % refresh_every == 0:
            np.testing.assert_allclose(sampler.probabilities, by_hand.density(), rtol=1e-4)
        warmed_up += bool((sampler.probabilities != sampler.probabilities[0]).any())
    assert 10 < warmed_up < 100
    np.testing.assert_allclose(sampler.weights * sampler.probabilities * T, 1, rtol=1e-5)


def test_a_broken_loss_is_not_kept_in_a_history():
    clean, dirty = make("loss_second_moment"), make("loss_second_moment")
    adapt(clean)
    adapt(dirty)
    for sampler, bad in ((clean, torch.nan), (dirty, torch.inf)):
        adapt(sampler, torch.where(torch.arange(T) % 3 == 0, bad, falling_loss(T)))
    assert_same_state(state_bits(clean), state_bits(dirty))


@pytest.mark.parametrize("name", ["loss_second_moment", "adaptive_log_snr"])
def test_a_density_without_a_floor_is_refused(name):
    option = {"loss_second_moment": "uniform_prob", "adaptive_log_snr": "uniform_fraction"}[name]
    with pytest.raises(ValueError, match=option):
        make(name, **{option: 0.0})


@pytest.mark.parametrize("name", RIVALS)
def test_renewing_never_is_refused(name):
    with pytest.raises(ValueError, match="refresh_every"):
        make(name, refresh_every=0)


# -------------------------------------------------------------------------------------------------------- uncertainty


def test_uncertainty_weighs_the_denoised_image_as_edm2_does():
    """lambda(sigma) / e^u ‖D - y‖^2 = w_t ‖eps - eps_theta‖^2."""
    sampler = adapt(make_timestep_sampler(scheduler(), "edm2"))
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(0, T, 37)
    image, noise, error = torch.randn(3, len(t), 48, generator=generator, dtype=torch.float64)
    sigma = tables().sigma[t, None]
    denoised = (image + sigma * noise) - sigma * (noise + 0.1 * error)
    lambda_ = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    edm2 = lambda_ / sampler.log_uncertainty[t, None].exp() * (denoised - image) ** 2
    own = sampler.weights[t, None].double() * (0.1 * error) ** 2
    torch.testing.assert_close(own, edm2, rtol=1e-5, atol=0)


def test_uncertainty_density_is_edm2s_for_pixels():
    mass = np.diff(stats.norm.cdf(log_sigma_edges("linear", T), loc=-0.8, scale=1.6))
    np.testing.assert_allclose(make("uncertainty").probabilities, mass / mass.sum(), rtol=2e-4, atol=1e-7)


def test_uncertainty_takes_the_steps_that_adam_takes_on_edm2s_loss():
    generator = torch.Generator().manual_seed(0)
    sampler = make("uncertainty", "edm", refresh_every=1)
    features = sampler._features
    v = torch.zeros(128, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([v], lr=0.01, betas=(0.9, 0.99))
    c = weightings.edm(tables()).float().double()
    for _ in range(30):
        t = sampler.sample(64).timesteps
        losses = falling_loss(T)[t] * squares(generator, 64)
        sampler.update(t, losses)
        u = (features @ v)[t]
        adam.zero_grad()
        (c[t] * losses.double() / u.exp() + u).mean().backward()
        adam.step()
    torch.testing.assert_close(sampler.coefficients, v.detach(), rtol=1e-4, atol=1e-6)
    assert float(features.square().sum(1).mean()) == pytest.approx(1, rel=0.1)  # unit variance, as EDM2's


@pytest.mark.parametrize("weighting", ["edm", "none"])
def test_uncertainty_learns_the_expected_loss(weighting):
    """At the minimum of l / e^u + u every timestep's weighted loss is 1, whatever the weighting was."""
    generator = torch.Generator().manual_seed(0)
    sampler = make("uncertainty", weighting)
    for _ in range(1000):
        t = sampler.sample(128).timesteps
        sampler.update(t, falling_loss(T)[t] * squares(generator, 128))
    weighted = sampler.weights * falling_loss(T)
    often_drawn = sampler.probabilities > 1e-4
    assert float(weighted[often_drawn].log().abs().max()) < 0.6
    assert float((sampler.probabilities * weighted).sum()) == pytest.approx(1, abs=0.1)
    assert float(sampler.log_uncertainty[often_drawn].std()) > 0.5  # it had something to learn


# --------------------------------------------------------------------------------------------------- adaptive log-SNR


def test_adaptive_log_snr_keeps_an_average_of_the_weighted_loss_by_bin():
    """One loss after the other, bin by bin, as a public port of VDM++ does."""
    generator = torch.Generator().manual_seed(0)
    sampler = make("adaptive_log_snr", "p2", refresh_every=1)
    log_snr = np.log(alphas_cumprod() / (1 - alphas_cumprod()))
    width = np.abs(np.gradient(log_snr))
    per_lambda = weightings.p2(tables()).numpy() / width  # w(lambda)
    edges = np.linspace(log_snr[-1], log_snr[0], 101)
    bins = (np.searchsorted(edges, log_snr, side="right") - 1).clip(0, 99)
    average = np.array([per_lambda[bins == b].mean() if (bins == b).any() else 0 for b in range(100)])
    np.testing.assert_allclose(sampler.bin_losses, average, rtol=1e-3)
    np.testing.assert_allclose(average[bins] * width * 1000, 1000 * weightings.p2(tables()).numpy(), rtol=0.3)
    for _ in range(200):
        t = int(torch.randint(T, (), generator=generator))
        losses = torch.full((5,), float(torch.rand((), generator=generator)))
        sampler.update(torch.full((5,), t), losses)
        for loss in losses.tolist():
            average[bins[t]] = 0.999 * average[bins[t]] + 0.001 * per_lambda[t] * loss
    expected = average[bins] * width
    np.testing.assert_allclose(sampler.probabilities, 0.999 * expected / expected.sum() + 0.001 / T, rtol=2e-3)
    product = sampler.probabilities * sampler.weights * T
    torch.testing.assert_close(product, weightings.p2(tables()).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting", ["none", "bell", "min_snr"])
def test_adaptive_log_snr_ends_where_every_draw_contributes_the_same(weighting):
    sampler = make("adaptive_log_snr", weighting, ema_rate=0.99)
    for _ in range(50):
        adapt(sampler)
    contribution = sampler.weights * falling_loss(T)
    spread = contribution[sampler.probabilities > 1e-5].log()
    assert float(spread.quantile(0.95) - spread.quantile(0.05)) < 0.25
    target = weightings.none(tables()) if weighting == "none" else getattr(weightings, weighting)(tables())
    target = target * falling_loss(T)
    assert total_variation(sampler.probabilities, target / target.sum()) < 0.03


# ---------------------------------------------------------------------------------------------------------- InfoNoise


def gaussian_channel_loss():
    """[T] the least epsilon-loss there is for images of unit variance: mmse / sigma^2 = 1 / (1 + sigma^2)."""
    return 1 / (1 + tables().sigma ** 2)


def information_density(loss, weighting, pivot):
    """pi = rho / w with both of the loss of the denoised image, per unit of sigma; then per timestep."""
    sigma = tables().sigma.numpy()
    mse = sigma**2 * loss.double().numpy()
    w = weighting.numpy() / sigma**2
    pi = mse / sigma**3 * sigma**3 / (sigma**3 + pivot**3) / w
    p = pi * np.gradient(sigma)
    return p / p.sum()


@pytest.mark.parametrize("pivot", [None, 0.15])
def test_info_noise_follows_the_entropy_rate_of_a_gaussian(pivot):
    sampler = make("info_noise", "edm", warmup=100, gate_pivot=pivot)
    loss = gaussian_channel_loss().float()
    before = sampler.probabilities.clone()
    for _ in range(99):
        sampler.update(torch.arange(T), loss)
    assert torch.equal(sampler.probabilities, before)  # EDM's own until it is warm
    np.testing.assert_allclose(before, make("log_normal", "edm").probabilities)
    sampler.update(torch.arange(T), loss)
    sigma = tables().sigma.numpy()
    rate = loss.numpy() / sigma
    onset = max(s for s, r in zip(sigma, rate, strict=True) if r >= 0.002 * rate.max())
    expected = information_density(loss, weightings.edm(tables()), pivot or onset)
    assert total_variation(sampler.probabilities, torch.from_numpy(expected)) < 0.05
    assert (sampler.weights == sampler.loss_weights).all()  # the objective's weight stays


def test_info_noises_product_does_not_depend_on_the_weighting():
    products = []
    for weighting in ("none", "edm", "min_snr"):
        sampler = make("info_noise", weighting, warmup=0, floor=0.0)
        for _ in range(100):
            sampler.update(torch.arange(T), falling_loss(T))
        products.append(sampler.probabilities * sampler.weights)
    for product in products[1:]:
        torch.testing.assert_close(product / product.sum(), products[0] / products[0].sum(), rtol=1e-3, atol=1e-9)


def test_info_noise_averages_the_last_losses_of_each_bin():
    sampler = make("info_noise", refresh_every=1)
    bin_of = sampler._bin_of_timestep
    t = int((bin_of == bin_of.mode().values).nonzero()[0])
    seen, average = deque(maxlen=256), None
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        losses = torch.rand(10, generator=generator)
        sampler.update(torch.full((10,), t), losses)
        seen.extend(losses.tolist())
        if len(seen) >= 50:
            average = np.mean(seen) if average is None else 0.1 * average + 0.9 * np.mean(seen)
            assert float(sampler.bin_losses[bin_of[t]]) == pytest.approx(average, rel=1e-4)
            assert float(sampler.expected_loss().min()) == pytest.approx(average, rel=1e-4)  # all that is known
        else:
            assert not sampler.expected_loss().isfinite().any()


def test_missing_bins_are_interpolated():
    n = NOTHING
    values = torch.tensor([n, n, 2.0, n, n, n, 6.0, 1.0, n])
    assert interpolate_missing(values).tolist() == [2, 2, 2, 3, 4, 5, 6, 1, 1]


# -------------------------------------------------------------------------------------------------------- Kim et al.


def test_vlb_scale_is_that_of_the_gaussian_kl():
    """KL(q(x_t-1 | x_t, x_0) ‖ p(x_t-1 | x_t)) of one pixel, in bits, with and without an error in epsilon."""
    abar = alphas_cumprod()
    scale = vlb_scale(tables())
    for t in (1, 2, 10, 500, 999):
        beta = 1 - abar[t] / abar[t - 1]
        variance = beta * (1 - abar[t - 1]) / (1 - abar[t])
        x_t, noise, error = 0.3, -0.8, 0.25

        def posterior_mean(noise, t=t, beta=beta, x_t=x_t):
            x_0 = (x_t - math.sqrt(1 - abar[t]) * noise) / math.sqrt(abar[t])
            mixed = math.sqrt(abar[t - 1]) * beta * x_0 + math.sqrt(1 - beta) * (1 - abar[t - 1]) * x_t
            return torch.tensor(mixed / (1 - abar[t]))

        q = torch.distributions.Normal(posterior_mean(noise), math.sqrt(variance))
        right, wrong = (
            torch.distributions.Normal(posterior_mean(predicted), math.sqrt(beta))
            for predicted in (noise, noise + error)
        )
        rise = torch.distributions.kl_divergence(q, wrong) - torch.distributions.kl_divergence(q, right)
        assert float(rise) / math.log(2) == pytest.approx(float(scale[t]) * error**2, rel=1e-2)
    assert (vlb_scale(tables("zero_snr")) >= 0).all()
    assert vlb_scale(tables("zero_snr")).isfinite().all()


@pytest.mark.parametrize("num_timesteps", [1000, 50])
def test_beta_table_is_the_distribution_of_a_rounded_draw(num_timesteps):
    alpha, beta = torch.tensor([[0.974, 0.974], [0.3, 2.0], [5.0, 1.0], [30.0, 60.0]], dtype=torch.float64).T
    edges = np.concatenate([[0], (np.arange(num_timesteps - 1) + 0.5) / (num_timesteps - 1), [1]])
    expected = np.stack([np.diff(stats.beta.cdf(edges, a, b)) for a, b in zip(alpha, beta, strict=True)])
    table = beta_table(alpha, beta, num_timesteps)
    np.testing.assert_allclose(table, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(table.sum(1), 1)


def test_selection_is_that_of_the_f_test():
    generator = torch.Generator().manual_seed(0)
    for rows in (5, 20):
        x = torch.randn(rows, T, generator=generator)
        x[:, 10] += 30 * torch.randn(rows, generator=generator)  # moves the sum
        x[:, 11] = 0.5
        expected = SelectKBest(f_regression, k=3).fit(x.double().numpy(), x.double().sum(1).numpy())
        assert best_predictors(x, 3).tolist() == expected.get_support(indices=True).tolist()


def images_of(batch_size, seed=0, channels=1, size=8):
    return torch.rand(batch_size, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class ToyModel:
    """Its loss at t falls by `gain`[t] in each update, whatever the noise."""

    def __init__(self, gain):
        self.level, self.gain, self.calls = torch.full((T,), 100.0), gain, []

    def denoising_loss(self, images, timesteps, noise):
        assert len(images) == len(timesteps)
        assert noise.shape == images.shape
        self.calls.append((timesteps, noise))
        return self.level[timesteps]

    def step(self, sampler, images):
        drawn = sampler.sample(len(images), images=images)
        sampler.before_update(images, self.denoising_loss)
        sampler.update(drawn[0], self.level[drawn[0]])
        self.level = self.level - self.gain
        sampler.after_update(self.denoising_loss)
        return drawn


def test_kim_begins_close_to_uniform():
    sampler = make("kim")
    start = F.softplus(torch.tensor(0.5)).item()
    expected = beta_table(torch.tensor([start]).double(), torch.tensor([start]).double(), T)[0]
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-4)
    assert total_variation(sampler.probabilities, uniform_density()) < 0.02
    timesteps = torch.cat([sampler.sample(64, images=images_of(64)).timesteps for _ in range(100)])
    statistic, dof = chi_square(timesteps, sampler.probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_kims_draws_are_of_each_images_own_density():
    sampler = make("kim")
    images = images_of(2)
    sampler.sample(2, images=images)
    sampler.policy += 0.05 * torch.randn(sampler.policy.shape, generator=torch.Generator().manual_seed(0))
    alpha, beta = beta_parameters(sampler.policy, 1, images)
    assert not torch.allclose(alpha[0], alpha[1])
    own = torch.stack([sampler.sample(2, images=images).timesteps for _ in range(3000)])
    for i, table in enumerate(beta_table(alpha.double(), beta.double(), T)):
        statistic, dof = chi_square(own[:, i], table)
        assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_kims_policy_is_the_published_network():
    """Convolutions, pooling and layers at 32x32 as modules, with the same weights."""
    sampler = make("kim", seed=3)
    images = images_of(5, channels=3, size=32)
    sampler.sample(5, images=images)
    blocks = [
        part
        for i, o in ((3, 32), (32, 64), (64, 128))
        for part in (torch.nn.Conv2d(i, o, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    ]
    head = [torch.nn.Linear(2048, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU()]
    network = torch.nn.Sequential(*blocks, torch.nn.Flatten(), *head, torch.nn.Linear(256, 2))
    torch.nn.utils.vector_to_parameters(sampler.policy, network.parameters())
    torch.testing.assert_close(network(images), torch.full((5, 2), 0.5))
    network[-1].weight.data.normal_()
    alpha, beta = (F.softplus(network(images)) + 1e-5).unbind(1)
    own = beta_parameters(torch.nn.utils.parameters_to_vector(network.parameters()), 3, images)
    torch.testing.assert_close(own[0], alpha)
    torch.testing.assert_close(own[1], beta)


def test_kim_ascends_the_published_reward():
    sampler, images = make("kim"), images_of(16)
    gain = torch.zeros(T)
    gain[1] = 0.7
    model = ToyModel(gain)
    x0 = sampler.sample(16, images=images)  # builds the policy
    assert x0.timesteps.shape == (16,)
    policy = sampler.policy.clone().requires_grad_()
    model.step(sampler, images)
    alpha, beta = beta_parameters(policy, 1, images)
    pi = torch.distributions.Beta(alpha, beta)
    reward = 0.7 * vlb_scale(tables())[1] + 0.01 * pi.entropy()
    loss = -(pi.log_prob(sampler._drawn) * reward).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy, 1.0)
    torch.optim.Adam([policy], lr=0.01).step()
    moved = sampler.policy - policy.detach()
    assert float(moved.abs().quantile(0.99)) < 1e-4  # Adam's first step has only the gradient's sign
    assert (sampler.policy[-2:] != 0.5).all()


def test_kim_learns_which_timesteps_pay():
    """The reward is what the loss at S falls by; here updates help S the more, the noisier their own timesteps."""
    sampler, images = make("kim", update_every=1, entropy_coef=0.0, learning_rate=1e-3), images_of(64)
    scale = vlb_scale(tables()).float()
    for _ in range(60):
        timesteps = sampler.sample(64, images=images).timesteps
        paid = timesteps / T - 0.5
        state = {"fall": torch.zeros(64)}

        def denoising_loss(images, t, noise, state=state):
            level = torch.ones(len(images)) * 10
            if len(images) == 64 and (t == t[0]).all():  # of the batch, at one timestep of S
                level = level - state["fall"] / scale[t] / 3
            return level

        sampler.before_update(images, denoising_loss)
        state["fall"] = paid
        sampler.after_update(denoising_loss)
    mean = float((sampler.probabilities * torch.arange(T)).sum()) / T
    assert mean > 0.6


def test_kim_measures_every_40_updates_with_the_same_noise_before_and_after():
    sampler, images = make("kim"), images_of(100)
    model = ToyModel(torch.ones(T))
    measured = []
    for update in range(82):
        model.calls.clear()
        model.step(sampler, images)
        if model.calls:
            measured.append(update)
            half = len(model.calls) // 2
            assert half == 3 + 10  # S, and all T in batches of 100
            for (t_before, before), (t_after, after) in zip(model.calls[:half], model.calls[half:], strict=True):
                assert torch.equal(t_before, t_after)
                assert torch.equal(before, after)
            everywhere = torch.cat([t for t, _ in model.calls[3:half]])
            assert torch.equal(everywhere.sort().values, torch.arange(T))
    assert measured == [0, 40, 80]
    assert sampler.num_falls == 3
    assert sampler.policy_steps == 3


def test_kims_queue_holds_the_falls_of_the_vlb():
    sampler, images = make("kim", update_every=1, queue_length=4), images_of(50)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(6):
        gain = torch.rand(T, generator=generator)
        ToyModel(gain).step(sampler, images)
        rows.append(gain * vlb_scale(tables()).float())
    expected = torch.stack(rows[-4:])
    torch.testing.assert_close(sampler.falls[torch.tensor([2, 3, 0, 1])], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(sampler.selected, best_predictors(sampler.falls, 3))


def test_kim_reloads_in_the_middle_and_goes_on(tmp_path):
    images = images_of(20)
    saved, model = make("kim", seed=1, update_every=3), ToyModel(falling_loss(T))
    for _ in range(7):
        model.step(saved, images)
    torch.save(saved.state_dict(), tmp_path / "kim.pt")
    loaded, other = make("kim", update_every=3), ToyModel(falling_loss(T))
    loaded.load_state_dict(torch.load(tmp_path / "kim.pt"))
    other.level = model.level
    for _ in range(5):
        a, b = model.step(saved, images), other.step(loaded, images)
        assert torch.equal(a[0], b[0])
        assert_same_state(state_bits(saved), state_bits(loaded))
    assert saved.policy_steps == 4


def test_kim_leaves_the_global_generator_alone_and_never_waits(monkeypatch):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sampler, images, losses = make("kim", update_every=2), images_of(500), falling_loss(T)
    sampler.sample(500, images=images)
    with no_host_sync(monkeypatch):
        for _ in range(3):
            drawn = sampler.sample(500, images=images)
            sampler.before_update(images, lambda images, t, noise: losses[t] * noise.square().mean((1, 2, 3)))
            sampler.update(drawn[0], losses[:500])
            sampler.after_update(lambda images, t, noise: losses[t] * noise.square().mean((1, 2, 3)) / 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kim_survives_a_broken_model(bad):
    sampler, images = make("kim", update_every=1), images_of(20)
    for step in range(4):
        model = ToyModel(torch.full((T,), bad) if step % 2 else falling_loss(T))
        model.step(sampler, images)
    assert sampler.policy.isfinite().all()
    assert sampler.probabilities.isfinite().all()
    assert sampler.probabilities.min() > 0


def test_kim_refuses_another_number_of_images():
    with pytest.raises(ValueError, match="3 images for 4 timesteps"):
        make("kim").sample(4, images=images_of(3))


def test_kim_without_images_draws_from_the_mean_policy():
    sampler, images = make("kim", update_every=1), images_of(64)
    sampler.sample(64, images=images)
    sampler.policy[-2:] = torch.tensor([3.0, 1.0])
    ToyModel(torch.zeros(T)).step(sampler, images)
    assert total_variation(sampler.probabilities, uniform_density()) > 0.2
    statistic, dof = chi_square(draws(sampler, 64, 80), sampler.probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


@pytest.mark.parametrize("name", [name for name in TIMESTEP_SAMPLERS if name != "kim"])
def test_the_others_neither_look_at_images_nor_at_the_model(name):
    def denoising_loss(images, timesteps, noise):
        raise AssertionError("only a sampler that learns from an update's effect may ask")

    sampler, reference = make(name), make(name)
    images = images_of(8)
    assert torch.equal(sampler.sample(8, images=images).timesteps, reference.sample(8).timesteps)
    sampler.before_update(images, denoising_loss)
    sampler.after_update(denoising_loss)
    assert_same_state(state_bits(sampler), state_bits(reference))


def test_methods_pair_the_rivals_as_published():
    assert METHODS["loss_second_moment"] == ("loss_second_moment", "none", "none")
    assert METHODS["edm2"] == ("uncertainty", "edm", "none")
    assert METHODS["kim"] == ("kim", "none", "none")
    assert list(METHODS)[-1] == list(TIMESTEP_SAMPLERS)[-1] == "adaptive"


# ------------------------------------------------------------------------------------------------------- two processes

WORKER = """
import sys
import torch
from accelerate import Accelerator
from samplers import NoiseSchedule, make_timestep_sampler

folder = sys.argv[1]
torch.set_num_threads(1)
rank = Accelerator(cpu=True).process_index
schedule = NoiseSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
loss = torch.load(f"{folder}/loss.pt")
out = {}
for name in ("loss_second_moment", "uncertainty", "adaptive_log_snr", "info_noise"):
    options = {"warmup": 4} if name == "info_noise" else {}
    options = {"refresh_every": 4, "error_filter": "none", **options}
    sampler = make_timestep_sampler(schedule, timestep_sampler=name, loss_weighting="edm", **options)
    for _ in range(40):
        t = torch.cat([torch.arange(1000)[rank::2], torch.arange(100 * rank)])  # batches differ in size
        sampler.update(t, loss[t])
    out[name] = {"weights": sampler.weights, "probabilities": sampler.probabilities}
    sampler.update(t, loss[t])
    nothing = sampler._nothing()
    sampler.load_state_dict(sampler.state_dict() | {"rank": 0})  # as when the first one's state is given to all
    out[name]["counts its own only"] = torch.equal(sampler.pending, nothing) == (rank == 1)

sampler = make_timestep_sampler(schedule, "kim", update_every=2)
generator = torch.Generator().manual_seed(rank)
level = loss.clone() * 10
def denoising_loss(images, t, noise):
    return level[t] * (1 + images.mean((1, 2, 3)))
out["draws"] = []
for step in range(7):
    images = torch.rand(30, 1, 8, 8, generator=generator)
    t = sampler.sample(30, images=images).timesteps
    out["draws"].append(t)
    sampler.before_update(images, denoising_loss)
    level = level * 0.9
    sampler.after_update(denoising_loss)
out["kim"] = sampler.state_dict()
torch.save(out, f"{folder}/rank{rank}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes saw."""
    return results_of_two_ranks(tmp_path_factory, WORKER, (falling_loss(T) * 256).round() / 256)


@pytest.mark.parametrize("name", RIVALS)
def test_ranks_learn_the_same_tables_as_one_process(ranks, name):
    loss = (falling_loss(T) * 256).round() / 256
    options = {"warmup": 4} if name == "info_noise" else {}
    alone = make(name, "edm", refresh_every=4, **options)
    t = torch.cat([torch.arange(T), torch.arange(100)])
    for _ in range(40):
        alone.update(t, loss[t])
    for table in ("probabilities", "weights"):
        first, second = (rank[name][table] for rank in ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, getattr(alone, table), rtol=3e-3, atol=1e-9)
    assert all(rank[name]["counts its own only"] for rank in ranks)
    untouched = make(name, "edm")
    learned = torch.stack([alone.probabilities, alone.weights]) / torch.stack(
        [untouched.probabilities, untouched.weights]
    )
    assert float((learned - 1).abs().max()) > 0.1


def test_ranks_hold_the_same_policy_and_draw_for_their_own_images(ranks):
    first, second = (rank["kim"] for rank in ranks)
    assert first.keys() == second.keys()
    assert_same_state(first, second)
    assert first["policy_steps"] == 4
    assert (first["falls"][:4].abs() > 0).any(1).all()
    assert not torch.equal(ranks[0]["draws"][0], ranks[1]["draws"][0])
