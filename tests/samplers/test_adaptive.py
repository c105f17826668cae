"""The adaptive sampler: it learns p_t ∝ c_t sqrt(L_t) from noisy losses, follows it, and all ranks learn the same."""

import pytest
import torch
from conftest import results_of_two_ranks
from test_samplers import adapt, assert_same_state, falling_loss, scheduler, state_bits

from samplers import TIMESTEP_SAMPLERS, NoiseSchedule, antithetic_randn, make_timestep_sampler

T = 1000


def adaptive(weighting="bell", **options):
    return make_timestep_sampler(scheduler(), "adaptive", loss_weighting=weighting, error_filter="none", **options)


def train(sampler, mean_loss, epochs, batch_size=500, seed=0):
    """Draw as many timesteps as `epochs` times T and report losses of that mean, as spread as squares are (chi^2_4)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs * T // batch_size):
        timesteps = sampler.sample(batch_size).timesteps
        noise = torch.randn(4, batch_size, generator=generator).square().mean(0)
        sampler.update(timesteps, mean_loss[timesteps] * noise)
    return sampler


def optimum(sampler, mean_loss):
    """p_t = (1 - f) c_t sqrt(L_t) / sum + f / T."""
    best = sampler.loss_weights.double() * mean_loss.double().sqrt()
    return (1 - sampler.uniform_fraction) * best / best.sum() + sampler.uniform_fraction / T


def total_variation(p, q):
    return float((p.double() - q.double()).abs().sum() / 2)


def uniform_density():
    return torch.full((T,), 1 / T)


# ------------------------------------------------------------------------------------------------------- what it learns


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


def test_it_is_uniform_until_warmed_up():
    sampler = adaptive(warmup=5.0)
    for step in range(1, 200):
        timesteps, weights = sampler.sample(50)
        assert torch.allclose(sampler.probabilities, torch.tensor(1 / T))
        assert torch.allclose(weights, sampler.loss_weights[timesteps])
        sampler.update(timesteps, falling_loss(T)[timesteps])
        if step * 50 >= 5 * T and step % 20 == 0:
            break
    assert step == 100
    assert total_variation(sampler.probabilities, uniform_density()) > 0.1


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
    """sum_t c_t^2 G_t / p_t, least at (sum_t c_t sqrt(G_t))^2, where G_t ∝ L_t."""
    sampler = train(adaptive(weighting), falling_loss(T), epochs=60)
    c, G = sampler.loss_weights.double(), falling_loss(T).double()
    least = float((c * G.sqrt()).sum() ** 2)
    uniform, own = (float((c**2 * G / p.double()).sum()) for p in (uniform_density(), sampler.probabilities))
    assert own < 0.9 * uniform
    assert own < 1.06 * least


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
    own = gradients(*sampler.sample(200000))
    assert float(own.mean()) == pytest.approx(float(uniform.mean()), abs=5 * float(uniform.std()) / 200000**0.5)
    assert own.var() < 0.8 * uniform.var()


@pytest.mark.parametrize("uniform_fraction", [0.0, -0.1, 1.1])
def test_a_density_without_a_floor_is_refused(uniform_fraction):
    with pytest.raises(ValueError, match="uniform_fraction"):
        adaptive(uniform_fraction=uniform_fraction)


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan")])
def test_a_memory_of_nothing_is_refused(memory):
    with pytest.raises(ValueError, match="memory"):
        adaptive(memory=memory)


# ------------------------------------------------------------------------------------------------------ noise in pairs


@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("batch_size", [64, 65])
def test_halves_of_a_batch_are_neighbours_in_t_and_in_random_order(batch_size, low_discrepancy):
    sampler = adapt(adaptive(low_discrepancy=low_discrepancy))
    pairs = batch_size // 2
    for _ in range(20):
        timesteps = sampler.sample(batch_size).timesteps
        first, second = timesteps[:pairs], timesteps[-pairs:]
        in_order = timesteps[timesteps.argsort()][: 2 * pairs].view(-1, 2)
        assert torch.equal((first + second).sort().values, in_order.sum(1))
        assert not torch.equal(first, first.sort().values)


def test_pairing_leaves_the_density_alone():
    paired, single = (adapt(adaptive(antithetic_noise=flag)) for flag in (True, False))
    for _ in range(5):
        drawn = [sampler.sample(100).timesteps.sort().values for sampler in (paired, single)]
        assert float((drawn[0] - drawn[1]).abs().double().mean()) < 10  # two offsets of the same strides


@pytest.mark.parametrize("batch_size", [1, 6, 7])
def test_antithetic_noise_is_gaussian_and_opposite(batch_size):
    noise = antithetic_randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert noise.shape == (batch_size, 3, 64, 64)
    pairs = batch_size // 2
    assert torch.equal(noise[:pairs], -noise[batch_size - pairs :])
    assert len(noise.flatten(1).unique(dim=0)) == batch_size  # and nothing else is repeated
    assert float(noise[0].std()) == pytest.approx(1, abs=0.03)


# ------------------------------------------------------------------------------------------------------- broken losses


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_losses_are_left_out(bad):
    losses = falling_loss(T).repeat(2)
    timesteps = torch.arange(T).repeat(2)
    broken = torch.arange(2 * T) % 5 == 0
    clean, dirty = adaptive(), adaptive()
    for _ in range(40):
        clean.update(timesteps, torch.where(broken, float("nan"), losses))
        dirty.update(timesteps, torch.where(broken, bad, losses))
    assert_same_state(state_bits(clean), state_bits(dirty))
    assert total_variation(dirty.probabilities, optimum(dirty, falling_loss(T))) < 0.01


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_warmup_of_broken_losses_alone_leaves_it_uniform_and_it_recovers(broken):
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


# ------------------------------------------------------------------------------------------------------- two processes

WORKER = """
import sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from samplers import TIMESTEP_SAMPLERS, NoiseSchedule, make_timestep_sampler

folder = sys.argv[1]
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
assert dist.is_initialized() and accelerator.num_processes == 2
schedule = NoiseSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
loss = torch.load(f"{folder}/loss.pt")
out = {"rank": rank}

def fresh(name="adaptive", **options):
    return make_timestep_sampler(schedule, timestep_sampler=name, loss_weighting="bell", error_filter="none", **options)

def train(sampler, steps, batch_size=100):
    for _ in range(steps):
        timesteps = sampler.sample(batch_size).timesteps
        sampler.update(timesteps, loss[timesteps])

for name in TIMESTEP_SAMPLERS:
    for low_discrepancy in (True, False):
        sampler = fresh(name, seed=3, low_discrepancy=low_discrepancy)
        out[name, low_discrepancy] = [tuple(sampler.sample(b)) for b in (1, 4, 7)]

sampler = fresh(refresh_every=4)
train(sampler, 90)
out["draws"] = sampler.sample(50).timesteps
out["state"] = sampler.state_dict()

sampler = fresh(refresh_every=4)
for _ in range(60):  # the ranks' batches differ in size, as at the end of an epoch
    sampler.update(torch.arange(1000)[: 300 - 100 * rank], loss[: 300 - 100 * rank])
out["uneven"] = sampler.probabilities

sampler = fresh(refresh_every=16)
accelerator.register_for_checkpointing(sampler)
train(sampler, 88)  # in the middle between two renewals
accelerator.save_state(f"{folder}/checkpoint")
own_state = sampler.state_dict()
train(sampler, 20)
out["uninterrupted"] = sampler.state_dict()
accelerator.load_state(f"{folder}/checkpoint")
train(sampler, 20)
out["resumed from the first's"] = sampler.state_dict()
sampler.load_state_dict(own_state)
train(sampler, 20)
out["resumed from its own"] = sampler.state_dict()

own_images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(rank)) * (1 + rank)
sampler = make_timestep_sampler(schedule, "adaptive", images=own_images)
filtered = sampler.losses(torch.ones(1000, 1, 8, 8), torch.arange(1000))
out["from the first's images"] = sampler.loss_weights, filtered

torch.save(out, f"{folder}/rank{rank}.pt")
accelerator.end_training()
"""


def schedule_of_worker():
    return NoiseSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, T, dtype=torch.float64).cumprod(0))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes saw."""
    return results_of_two_ranks(tmp_path_factory, WORKER, (falling_loss(T) * 256).round() / 256)


@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_ranks_share_the_draws_of_one_process(ranks, name, low_discrepancy):
    options = {"seed": 3, "low_discrepancy": low_discrepancy, "error_filter": "none"}
    alone = make_timestep_sampler(schedule_of_worker(), timestep_sampler=name, loss_weighting="bell", **options)
    for i, batch_size in enumerate((1, 4, 7)):
        shares = [rank[name, low_discrepancy][i] for rank in ranks]
        assert shares[0][0].shape == (batch_size,)
        assert batch_size < 4 or not torch.equal(shares[0][0], shares[1][0])
        for ours, own in zip(zip(*shares, strict=True), alone.sample(2 * batch_size), strict=True):
            assert torch.equal(torch.stack(ours, 1).flatten(), own)


def test_ranks_take_the_data_s_spectrum_from_the_first_one_s_images(ranks):
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = make_timestep_sampler(schedule_of_worker(), "adaptive", images=images)
    losses = alone.losses(torch.ones(1000, 1, 8, 8), torch.arange(1000))
    for rank in ranks:
        loss_weights, filtered = rank["from the first's images"]
        torch.testing.assert_close(loss_weights, alone.loss_weights)
        torch.testing.assert_close(filtered, losses)


def test_ranks_hold_the_same_tables_as_one_process_with_both_halves(ranks):
    loss = (falling_loss(T) * 256).round() / 256
    options = {"refresh_every": 4, "error_filter": "none"}
    alone = make_timestep_sampler(schedule_of_worker(), "adaptive", loss_weighting="bell", **options)
    for _ in range(90):
        timesteps = alone.sample(200).timesteps
        alone.update(timesteps, loss[timesteps])
    assert total_variation(alone.probabilities, uniform_density()) > 0.1
    first, second = (rank["state"]["probabilities"] for rank in ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.probabilities)
    torch.testing.assert_close(ranks[0]["state"]["sums"], alone.sums)
    assert torch.equal(torch.stack([rank["draws"] for rank in ranks], 1).flatten(), alone.sample(100).timesteps)


def test_ranks_hold_the_same_tables_when_their_batches_differ_in_size(ranks):
    assert torch.equal(ranks[0]["uneven"], ranks[1]["uneven"])
    assert total_variation(ranks[0]["uneven"], uniform_density()) > 0.1


def test_states_saved_one_a_rank_resume_exactly_between_two_renewals(ranks):
    for rank in ranks:
        for name in ("probabilities", "sums", "pending", "draws_seen", "updates", "num_draws"):
            value = rank["uninterrupted"][name]
            torch.testing.assert_close(rank["resumed from its own"][name], value, rtol=0, atol=0)


def test_a_state_of_the_first_rank_for_all_counts_no_loss_twice(ranks):
    """Accelerate saves the main process's state and gives it to every rank: the other's last losses are left out."""
    first, second = (rank["resumed from the first's"] for rank in ranks)
    for name in ("probabilities", "sums", "draws_seen", "updates", "num_draws"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    left_out = ranks[0]["uninterrupted"]["draws_seen"] - first["draws_seen"]
    assert left_out == 8 * 100  # of one rank, in the 8 updates from the renewal at 80 to the save at 88


def test_a_single_process_makes_no_collective(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **k: pytest.fail("a collective on one process"))
    assert total_variation(adapt(adaptive()).probabilities, uniform_density()) > 0.1
