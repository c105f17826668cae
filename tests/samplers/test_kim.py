"""Kim et al.'s learned policy: its parts against other implementations, and its reward one update at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sampler_helpers import (
    T,
    alphas_cumprod,
    assert_same_state,
    chi_square,
    draws,
    falling_loss,
    images_of,
    make_sampler,
    no_host_sync,
    scheduler,
    state_bits,
    tables,
    total_variation,
    uniform_density,
)
from scipy import stats
from sklearn.feature_selection import SelectKBest, f_regression

from samplers import make_timestep_sampler
from samplers.kim import best_predictors, beta_parameters, beta_table, vlb_scale


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


class ToyModel:
    """Its loss at t falls by `gain`[t] in each update, whatever the noise."""

    def __init__(self, gain):
        self.level, self.gain, self.calls = torch.full((T,), 100.0), gain, []

    def denoising_loss(self, images, noise, timesteps):
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
    sampler = make_sampler("kim")
    start = F.softplus(torch.tensor(0.5)).item()
    expected = beta_table(torch.tensor([start]).double(), torch.tensor([start]).double(), T)[0]
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-4)
    assert total_variation(sampler.probabilities, uniform_density()) < 0.02
    timesteps = torch.cat([sampler.sample(64, images=images_of(64)).timesteps for _ in range(100)])
    statistic, dof = chi_square(timesteps, sampler.probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_kims_draws_are_of_each_images_own_density():
    sampler = make_sampler("kim")
    images = images_of(2)
    sampler.sample(2, images=images)
    sampler.policy += 0.05 * torch.randn(sampler.policy.shape, generator=torch.Generator().manual_seed(0))
    alpha, beta = beta_parameters(sampler.policy, 1, images)
    assert not torch.allclose(alpha[0], alpha[1])
    drawn = torch.stack([sampler.sample(2, images=images).timesteps for _ in range(3000)])
    for i, table in enumerate(beta_table(alpha.double(), beta.double(), T)):
        statistic, dof = chi_square(drawn[:, i], table)
        assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_kims_policy_is_the_published_network():
    """Convolutions, pooling and layers at 32x32 as modules, with the same weights."""
    sampler = make_sampler("kim", seed=3)
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
    ours = beta_parameters(torch.nn.utils.parameters_to_vector(network.parameters()), 3, images)
    torch.testing.assert_close(ours[0], alpha)
    torch.testing.assert_close(ours[1], beta)


def test_kim_ascends_the_published_reward():
    sampler, images = make_sampler("kim"), images_of(16)
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
    sampler, images = make_sampler("kim", update_every=1, entropy_coef=0.0, learning_rate=1e-3), images_of(64)
    scale = vlb_scale(tables()).float()
    for _ in range(60):
        timesteps = sampler.sample(64, images=images).timesteps
        paid = timesteps / T - 0.5
        state = {"fall": torch.zeros(64)}

        def denoising_loss(images, noise, t, state=state):
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
    sampler, images = make_sampler("kim"), images_of(100)
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
            all_timesteps = torch.cat([t for t, _ in model.calls[3:half]])
            assert torch.equal(all_timesteps.sort().values, torch.arange(T))
    assert measured == [0, 40, 80]
    assert sampler.num_falls == 3
    assert sampler.policy_steps == 3


def test_kims_queue_holds_the_falls_of_the_vlb():
    sampler, images = make_sampler("kim", update_every=1, queue_length=4), images_of(50)
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
    saved, model = make_sampler("kim", seed=1, update_every=3), ToyModel(falling_loss(T))
    for _ in range(7):
        model.step(saved, images)
    torch.save(saved.state_dict(), tmp_path / "kim.pt")
    loaded, other = make_sampler("kim", update_every=3), ToyModel(falling_loss(T))
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
    sampler, images, losses = make_sampler("kim", update_every=2), images_of(500), falling_loss(T)
    sampler.sample(500, images=images)
    with no_host_sync(monkeypatch):
        for _ in range(3):
            drawn = sampler.sample(500, images=images)
            sampler.before_update(images, lambda images, noise, t: losses[t] * noise.square().mean((1, 2, 3)))
            sampler.update(drawn[0], losses[:500])
            sampler.after_update(lambda images, noise, t: losses[t] * noise.square().mean((1, 2, 3)) / 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kim_survives_a_broken_model(bad):
    sampler, images = make_sampler("kim", update_every=1), images_of(20)
    for step in range(4):
        model = ToyModel(torch.full((T,), bad) if step % 2 else falling_loss(T))
        model.step(sampler, images)
    assert sampler.policy.isfinite().all()
    assert sampler.probabilities.isfinite().all()
    assert sampler.probabilities.min() > 0


def test_kim_refuses_another_number_of_images():
    with pytest.raises(ValueError, match="3 images for 4 timesteps"):
        make_sampler("kim").sample(4, images=images_of(3))


def test_kim_without_images_draws_from_the_mean_policy():
    sampler, images = make_sampler("kim", update_every=1), images_of(64)
    sampler.sample(64, images=images)
    sampler.policy[-2:] = torch.tensor([3.0, 1.0])
    ToyModel(torch.zeros(T)).step(sampler, images)
    assert total_variation(sampler.probabilities, uniform_density()) > 0.2
    statistic, dof = chi_square(draws(sampler, 64, 80), sampler.probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_kim_selects_no_more_timesteps_than_there_are():
    sampler = make_timestep_sampler(scheduler(), "kim", min_timestep=10, max_timestep=11)
    for _ in range(3):
        images = images_of(8)
        sampler.sample(8, images=images)
        sampler.before_update(images, lambda images, noise, timesteps: torch.ones(len(timesteps)))
        sampler.after_update(lambda images, noise, timesteps: torch.full((len(timesteps),), 0.5))
    assert sampler.policy_steps == 1
