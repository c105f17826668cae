"""Every timestep sampler on every noise schedule it allows: draws, tables, state; and each paper's formula."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

from samplers import (
    LOSS_WEIGHTINGS,
    METHODS,
    TIMESTEP_SAMPLERS,
    AdaptiveSampler,
    NoiseSchedule,
    Spectrum,
    UniformSampler,
    WienerFilter,
    epsilon_loss_scale,
    fold_seed,
    make_timestep_sampler,
    weightings,
)

torch.set_num_threads(1)  # the tensors are small: threads only wait for each other

SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero_snr": {"rescale_betas_zero_snr": True},
}
LENGTHS = (1000, 4000, 50)
WEIGHTING_OF = {name: "none" for name in TIMESTEP_SAMPLERS} | {"adaptive": "bell"}


# ---------------------------------------------------------------------------------------------------------- helpers


@functools.cache
def scheduler(name="linear", T=1000):
    return DDPMScheduler(num_train_timesteps=T, **SCHEDULES[name])


def alphas_cumprod(name="linear", T=1000):
    return scheduler(name, T).alphas_cumprod.double().numpy()


def tables(name="linear", T=1000):
    return NoiseSchedule.from_scheduler(scheduler(name, T))


def never_converges(name, T):
    """Does sqrt(1 - abar_t) still rise by 0.1 / T at the last timestep? Then SpeeD's boundary does not exist."""
    return np.gradient(np.sqrt(1 - alphas_cumprod(name, T)))[-1] >= 0.1 / T


def falling_loss(T):
    """[T] a mean loss as training shows it: large at the clean end, small at the noisy end."""
    return 0.02 + torch.exp(-5 * torch.arange(T) / T)


def adapt(sampler, mean_loss=None):
    """Show an adaptive sampler its mean loss at every timestep, exactly, until it renews its density."""
    T = sampler.num_train_timesteps
    mean_loss = falling_loss(T) if mean_loss is None else mean_loss
    for _ in range(getattr(sampler, "refresh_every", 1)):
        sampler.update(torch.arange(T, device=sampler.device), mean_loss.to(sampler.device))
    return sampler


def some_images():
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def weighting_table(name, schedule):
    data = [Spectrum.of(some_images()).variances.flatten()] if name == "spectral" else []
    return LOSS_WEIGHTINGS[name](schedule, *data)


def make(name, schedule="linear", T=1000, weighting=None, **options):
    """A sampler as it is in mid-training: the adaptive one has adapted."""
    weighting = weighting or WEIGHTING_OF[name]
    noise_scheduler = scheduler(schedule, T)
    options = {"images": some_images(), **options}
    return adapt(make_timestep_sampler(noise_scheduler, timestep_sampler=name, loss_weighting=weighting, **options))


def draws(sampler, batch_size, num_batches):
    """[num_batches, batch_size]"""
    return torch.stack([sampler.sample(batch_size).timesteps for _ in range(num_batches)])


def cumulative_counts(timesteps, T):
    """[K, T] how many of the K batches' draws [K, B] are <= t."""
    every_t = torch.arange(T).expand(len(timesteps), T).contiguous()
    return torch.searchsorted(timesteps.sort(1).values, every_t, right=True)


def chi_square(timesteps, probabilities, per_bin=20):
    """(statistic, degrees of freedom) on neighbouring timesteps merged until about `per_bin` draws are expected."""
    expected = probabilities.double() * timesteps.numel()
    bins = ((expected.cumsum(0) - expected / 2) / per_bin).long().unique(return_inverse=True)[1]
    observed = torch.bincount(bins[timesteps.flatten()], minlength=int(bins.max()) + 1).double()
    expected = torch.zeros_like(observed).index_add_(0, bins, expected)
    return float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1


def state_bits(sampler):
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in sampler.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], name


@contextlib.contextmanager
def no_host_sync(monkeypatch):
    """Fail on whatever would make the host wait for the device."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal", "_unique2")

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            indices = args[1] if name in ("index", "index_put", "index_put_") else ()
            waits = name in forbidden or any(torch.is_tensor(i) and i.dtype == torch.bool for i in indices)
            assert not waits, f"{func} waits for the device"
            return func(*args, **(kwargs or {}))

    def waits_for_the_device(self, name, *args, **kwargs):
        raise AssertionError(f"Tensor.{name} waits for the device")

    with monkeypatch.context() as patch, Mode():
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__array__", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, functools.partialmethod(waits_for_the_device, name))
        yield


def schedules(condition=lambda schedule, T: True):
    """A parametrisation over the noise schedules that fulfil a condition."""
    rows = [(schedule, T) for schedule in SCHEDULES for T in LENGTHS if condition(schedule, T)]
    return pytest.mark.parametrize(("schedule", "T"), rows, ids=[f"{schedule}-{T}" for schedule, T in rows])


every_schedule = schedules()
every_schedule_with_signal = schedules(lambda schedule, T: alphas_cumprod(schedule, T)[-1] > 0)
every_converging_schedule = schedules(lambda schedule, T: not never_converges(schedule, T))
every_sampler = pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
allowed = pytest.mark.parametrize(
    ("name", "schedule", "T"),
    [
        pytest.param(name, schedule, T, id=f"{name}-{schedule}-{T}")
        for name in TIMESTEP_SAMPLERS
        for schedule in SCHEDULES
        for T in LENGTHS
        if not (name == "speed" and never_converges(schedule, T))
    ],
)


# --------------------------------------------------------------------------------------- which combinations are allowed


@every_schedule
@every_sampler
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_a_combination_works_or_is_refused_by_name(name, weighting, schedule, T):
    culprits = set()
    if never_converges(schedule, T):
        culprits |= {"speed", "change_aware"} & {name, weighting}
    if alphas_cumprod(schedule, T)[-1] == 0:
        culprits |= {"edm"} & {weighting}
    if culprits:
        with pytest.raises(ValueError, match="|".join(culprits)):
            make(name, schedule, T, weighting)
        return
    sampler = make(name, schedule, T, weighting)
    p, w = sampler.probabilities, sampler.weights
    assert p.shape == w.shape == (T,)
    assert p.isfinite().all()
    assert p.min() > 0
    assert abs(float(p.double().sum()) - 1) < 1e-5
    assert w.isfinite().all()
    assert w.min() >= 0
    assert w.max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_published_methods_are_built_by_name(method):
    sampler = make_timestep_sampler(scheduler(), method, images=some_images())
    name, weighting, error_filter = METHODS[method]
    assert type(sampler) is TIMESTEP_SAMPLERS[name]
    assert torch.allclose(sampler.loss_weights.double(), weighting_table(weighting, tables()))
    assert isinstance(sampler.error_filter, WienerFilter) == (error_filter == "wiener")


@pytest.mark.parametrize("kind", ["method", "timestep_sampler", "loss_weighting", "error_filter"])
def test_unknown_names_are_refused_with_the_known_ones(kind):
    with pytest.raises(ValueError, match=f"{kind} .*'nonsense'"):
        make_timestep_sampler(scheduler(), **{kind: "nonsense"})


def test_schedulers_without_a_discrete_schedule_are_refused_by_name():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        make_timestep_sampler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="num_train_timesteps"):
        make_timestep_sampler(DDPMScheduler(num_train_timesteps=1))


def test_speed_refuses_a_schedule_that_hardly_adds_noise():
    flat = DDPMScheduler(num_train_timesteps=50, beta_start=1e-7, beta_end=1e-7)
    with pytest.raises(ValueError, match="speed"):
        make_timestep_sampler(flat, timestep_sampler="speed", loss_weighting="none", error_filter="none")


@pytest.mark.parametrize("method", METHODS)
def test_weights_beyond_float32_are_refused_by_name(method):
    almost_no_signal = DDPMScheduler(num_train_timesteps=10000)  # abar_T = 3e-44: EDM's weight is 1e44
    try:
        sampler = make_timestep_sampler(almost_no_signal, method, images=some_images())
    except ValueError as error:
        assert any(name in str(error) for name in METHODS[method])  # noqa: PT017
    else:
        assert sampler.weights.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("low_discrepancy", [True, False])
@allowed
def test_draws_are_timesteps_on_the_device(name, schedule, T, low_discrepancy, device):
    sampler = make(name, schedule, T, low_discrepancy=low_discrepancy, device=device)
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
    a, b, c = (draws(make(name, low_discrepancy=low_discrepancy, seed=seed), 16, 5) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len({tuple(batch.tolist()) for batch in (*a, *c)}) == 10  # no batch is drawn twice


@every_sampler
def test_a_generator_of_the_users_own_decides_the_draws(name):
    sampler = make(name)
    first, second = (sampler.sample(16, torch.Generator().manual_seed(3)).timesteps for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sampler.sample(16, torch.Generator().manual_seed(4)).timesteps)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make("adaptive").sample(8)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_of_a_run_never_collide():
    assert len({fold_seed(7, step) for step in range(10000)}) == 10000
    assert len({fold_seed(seed, step) for seed in range(10) for step in range(1000)}) == 10000
    assert len({fold_seed(7, step, stream) for step in range(1000) for stream in range(5)}) == 5000
    assert all(0 <= fold_seed(seed, 5) < 2**32 for seed in (0, 1, 2**31, 2**40))  # all that a CPU generator reads


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 1200), (15, 150), (64, 80)])
@allowed
def test_independent_draws_have_the_stated_density(name, schedule, T, batch_size, num_batches):
    sampler = make(name, schedule, T, low_discrepancy=False)
    statistic, dof = chi_square(draws(sampler, batch_size, num_batches), sampler.probabilities)
    pairs = 2 if name == "speed" and batch_size > 1 else 1  # SpeeD's draws come in dependent pairs
    assert statistic < pairs * (dof + 5 * (2 * dof) ** 0.5)


@pytest.mark.parametrize(("batch_size", "num_batches"), [(15, 100), (64, 100)])
@allowed
def test_low_discrepancy_draws_have_the_stated_density_far_more_closely(name, schedule, T, batch_size, num_batches):
    sampler = make(name, schedule, T)
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
    sampler = make(name, schedule, T)
    statistic, dof = chi_square(draws(sampler, batch_size, 1200), sampler.probabilities, per_bin=40)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_speed_mirrors_keep_their_share_in_odd_batches(batch_size, low_discrepancy):
    sampler = make("speed", low_discrepancy=low_discrepancy)
    num_batches = 12000 // batch_size
    above = (draws(sampler, batch_size, num_batches) >= 641).double().mean()
    # Above tau = 641: 359 of 5 * 641 + 359 shares in the drawn half; in the mirrored one, t = 0 alone lands there.
    expected = (359 + 5) / (5 * 641 + 359) / 2
    assert abs(float(above) - expected) < 5 * (2 * expected / 12000) ** 0.5


@allowed
def test_low_discrepancy_removes_most_of_the_variance_that_t_adds(name, schedule, T):
    sampler = make(name, schedule, T)
    table = torch.cos(2 * torch.arange(T) / T).double()
    p = sampler.probabilities.double()
    independent = (p * (table - p @ table) ** 2).sum() / 64
    assert table[draws(sampler, 64, 100)].mean(1).var() < 0.1 * independent


@pytest.mark.parametrize("name", ["uniform", "log_normal", "adaptive"])
def test_rounding_never_draws_from_farther_out_in_the_tail_than_the_last_point(name):
    """Of n equally spaced points the last is (n - 1 + offset) / n: it must not be rounded to 1, which is no draw."""
    n, seed = 2**22, 19
    (offset,) = torch.rand(1, generator=torch.Generator().manual_seed(seed)).double()
    assert 0.5 < offset < 0.99
    sampler = make(name, T=4000)
    farthest = sampler.sample(n, torch.Generator().manual_seed(seed)).timesteps.max()
    assert sampler.probabilities[farthest:].double().sum() * n > 0.9 * (1 - offset)


# --------------------------------------------------------------------------------------------------------- objectives


@every_schedule
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_importance_sampling_is_unbiased_for_every_table(weighting, schedule, T):
    corrected = [name for name, kind in TIMESTEP_SAMPLERS.items() if kind.corrects_for_density]
    assert "adaptive" in corrected
    for name in corrected:
        try:
            sampler = make(name, schedule, T, weighting)
        except ValueError:
            continue  # refused: see above
        assert not torch.allclose(sampler.probabilities, torch.tensor(1 / T), rtol=0.01)  # it has adapted
        table = torch.rand(T, generator=torch.Generator().manual_seed(0)).double()
        p, w = sampler.probabilities.double(), sampler.weights.double()
        c = weighting_table(weighting, tables(schedule, T))
        assert float((p * w * table).sum()) == pytest.approx(float((c * table).mean()), rel=1e-5)


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_importance_sampling_is_unbiased_in_practice(low_discrepancy):
    sampler = make("adaptive", low_discrepancy=low_discrepancy)
    table = 1 + torch.sin(7 * torch.arange(1000) / 1000).double()
    batches = [sampler.sample(64) for _ in range(400)]
    estimates = torch.stack([(w * table[t]).mean() for t, w in batches])
    truth = float((weightings.bell(tables()) * table).mean())
    assert abs(float(estimates.mean()) - truth) < 4 * float(estimates.std()) / 20


@every_sampler
def test_other_samplers_change_the_objective_and_leave_the_weighting_alone(name):
    sampler = make(name, weighting="p2")
    if not sampler.corrects_for_density and name != "uncertainty":  # which learns the weighting
        assert torch.allclose(sampler.weights.double(), 1 / (1 + tables().snr))


@every_schedule_with_signal
def test_log_normals_floor_hardly_moves_edms_objective(schedule, T):
    sampler = make("log_normal", schedule, T, "edm")
    c = weightings.edm(tables(schedule, T))
    mass = torch.from_numpy(normal_mass(schedule, T))
    objective, papers = sampler.probabilities.double() * sampler.weights.double(), mass / mass.sum() * c
    assert float((objective - papers).abs().sum() / papers.sum()) < 0.01


# -------------------------------------------------------------------------------------------------------------- state


@every_sampler
@pytest.mark.parametrize("steps", [0, 1, 50])
def test_reloaded_it_goes_on_with_the_very_same_draws(name, steps, tmp_path):
    """Also between two renewals of the density: 50 is not a multiple of 20."""

    def train(sampler, steps):
        for _ in range(steps):
            timesteps = sampler.sample(32).timesteps
            sampler.update(timesteps, falling_loss(1000)[timesteps] + timesteps % 7)
        return sampler

    def fresh(seed):
        return make_timestep_sampler(scheduler(), timestep_sampler=name, images=some_images(), seed=seed)

    saved = train(adapt(fresh(5)) if steps else fresh(5), steps)
    torch.save(saved.state_dict(), tmp_path / "sampler.pt")
    loaded = fresh(0)
    loaded.load_state_dict(torch.load(tmp_path / "sampler.pt"))
    for _ in range(3):
        assert_same_state(state_bits(saved), state_bits(loaded))
        assert torch.equal(saved.weights, loaded.weights)
        for a, b in zip(saved.sample(16), loaded.sample(16), strict=True):
            assert torch.equal(a, b)
        train(saved, 15)
        train(loaded, 15)


@every_sampler
def test_a_saved_state_is_a_snapshot(name):
    sampler = make(name)
    state = sampler.state_dict()
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}
    other = make(name)
    other.load_state_dict(state)
    for owner in (sampler, other):
        owner.sample(8)
        owner.update(torch.arange(1000), torch.ones(1000))
        adapt(owner, torch.ones(1000))
    assert_same_state(state, before)


@every_sampler
def test_a_state_of_another_kind_or_length_is_refused_by_name(name):
    sampler = make(name)
    before = state_bits(sampler)
    other = "uniform" if name != "uniform" else "adaptive"
    with pytest.raises(ValueError, match=TIMESTEP_SAMPLERS[other].__name__):
        sampler.load_state_dict(make(other).state_dict())
    with pytest.raises(ValueError, match=r"num_train_timesteps is 4000"):
        sampler.load_state_dict(make(name, T=4000).state_dict())
    assert_same_state(state_bits(sampler), before)


@every_sampler
def test_accelerate_checkpoints_it(name, tmp_path):
    accelerator, sampler = Accelerator(cpu=True), make(name)
    accelerator.register_for_checkpointing(sampler)
    sampler.sample(8)
    sampler.update(torch.arange(10), torch.ones(10))
    accelerator.save_state(tmp_path)
    expected, next_draws = state_bits(sampler), draws(sampler, 8, 3)
    adapt(sampler, torch.rand(1000))
    accelerator.load_state(tmp_path)
    assert_same_state(state_bits(sampler), expected)
    assert torch.equal(draws(sampler, 8, 3), next_draws)


# ------------------------------------------------------------------------------------------------------ the step path


@every_sampler
def test_losses_that_are_not_finite_never_poison(name):
    sampler = make(name)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for _ in range(25):
            sampler.update(torch.arange(1000), torch.full((1000,), bad))
        assert sampler.probabilities.isfinite().all()
        assert sampler.probabilities.min() > 0
        assert sampler.sample(64).weights.isfinite().all()


def learn_from_a_step(sampler, errors):
    timesteps, weights = sampler.sample(len(errors))
    losses = sampler.losses(errors, timesteps)
    (weights * losses).mean().backward()
    sampler.update(timesteps, losses.detach())


@every_sampler
@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_neither_sample_nor_losses_nor_update_wait_for_the_device(name, low_discrepancy, monkeypatch):
    sampler = make(name, low_discrepancy=low_discrepancy)
    errors = torch.randn(32, *some_images().shape[1:], requires_grad=True)
    with no_host_sync(monkeypatch):
        for _ in range(2 * getattr(sampler, "refresh_every", 1)):
            learn_from_a_step(sampler, errors)


def test_the_guard_against_waiting_does_notice(monkeypatch):
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.tolist(), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match="waits"), no_host_sync(monkeypatch):
            wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_sampler
def test_cuda_sees_no_synchronisation(name):
    sampler = make(name, device="cuda")
    errors = torch.randn(32, *some_images().shape[1:], device="cuda", requires_grad=True)
    learn_from_a_step(sampler, errors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * getattr(sampler, "refresh_every", 1)):
            learn_from_a_step(sampler, errors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_sampler
def test_update_takes_losses_as_a_training_loop_has_them(name):
    reference, sampler = make(name), make(name)
    losses = (torch.arange(1000) % 8 / 8 + 0.5).bfloat16().requires_grad_()  # attached to a graph, in half precision
    adapt(reference, losses.detach().float())
    adapt(sampler, losses)
    assert_same_state(state_bits(sampler), state_bits(reference))
    assert not sampler.probabilities.requires_grad


# ------------------------------------------------------------------------------------- the papers' formulas: weightings


@every_schedule
def test_none_is_ddpms_simple_loss(schedule, T):
    assert (weightings.none(tables(schedule, T)) == 1).all()


@every_schedule
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_for_each_prediction_type(schedule, T, gamma):
    """min(snr, gamma) on the x_0-loss, / snr on the epsilon-loss, / (snr + 1) on the v-loss (arXiv 2303.09556)."""
    snr = alphas_cumprod(schedule, T) / (1 - alphas_cumprod(schedule, T))
    c = weightings.min_snr(tables(schedule, T), gamma)
    has_signal = snr > 0
    expected = np.minimum(snr, gamma)[has_signal] / snr[has_signal]
    np.testing.assert_allclose(c[has_signal], expected, rtol=1e-9)
    assert (c[~has_signal] == 1).all()  # the limit
    on_v, on_x0 = (c * epsilon_loss_scale(tables(schedule, T), kind) for kind in ("v_prediction", "sample"))
    np.testing.assert_allclose(on_v, np.minimum(snr, gamma) / (snr + 1), rtol=1e-9)
    np.testing.assert_allclose(on_x0, np.minimum(snr, gamma), rtol=1e-9)


@every_schedule
def test_p2(schedule, T):
    snr = alphas_cumprod(schedule, T) / (1 - alphas_cumprod(schedule, T))
    np.testing.assert_allclose(weightings.p2(tables(schedule, T)), 1 / (1 + snr), rtol=1e-9)
    np.testing.assert_allclose(weightings.p2(tables(schedule, T), k=2.0, gamma=0.5), (2 + snr) ** -0.5, rtol=1e-9)


def perturbed(schedule, T):
    """x_0, eps and a wrong eps [64, 3, 4, 4] at 64 timesteps t with some signal, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, error = (torch.randn(64, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return x0, eps, eps + 0.1 * error, torch.linspace(0, T - 2, 64).long()


def mean_square(x):
    return x.square().mean((1, 2, 3))


@every_schedule
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_its_own_loss_on_the_denoised_image(schedule, T, sigma_data):
    """E[(sigma^2 + sd^2) / (sigma sd)^2 |D(x_0 + sigma n) - x_0|^2], with D from the predicted epsilon."""
    x0, eps, predicted, t = perturbed(schedule, T)
    abar = tables(schedule, T).alphas_cumprod[t].view(-1, 1, 1, 1)
    sigma = ((1 - abar) / abar).sqrt()
    denoised = (x0 + sigma * eps) - sigma * predicted
    lambda_ = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    c = weightings.edm(tables(schedule, T), sigma_data)[t]
    torch.testing.assert_close(c * mean_square(predicted - eps), lambda_.flatten() * mean_square(denoised - x0),
                               rtol=1e-6, atol=0)  # fmt: skip


@every_schedule
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_epsilon_loss_scale_converts_each_prediction_types_loss(schedule, T, prediction_type):
    x0, eps, predicted_eps, t = perturbed(schedule, T)
    ddpm = scheduler(schedule, T)
    noisy = ddpm.add_noise(x0, eps, t)
    abar = ddpm.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    predicted_x0 = (noisy - (1 - abar).sqrt() * predicted_eps) / abar.sqrt()  # the same network's, at the same x_t
    target, prediction = {
        "epsilon": (eps, predicted_eps),
        "sample": (x0, predicted_x0),
        "v_prediction": (ddpm.get_velocity(x0, eps, t), ddpm.get_velocity(predicted_x0, predicted_eps, t)),
    }[prediction_type]
    scale = epsilon_loss_scale(tables(schedule, T), prediction_type)[t]
    torch.testing.assert_close(scale * mean_square(prediction - target), mean_square(predicted_eps - eps),
                               rtol=1e-5, atol=0)  # fmt: skip


def test_epsilon_loss_scale_refuses_other_prediction_types_by_name():
    with pytest.raises(ValueError, match="flow"):
        epsilon_loss_scale(tables(), "flow")


def bell_where_there_is_signal(schedule, T, k):
    """[T - 1] without the last timestep: for k < 2 the weight at abar = 0 is infinite."""
    return weightings.bell(NoiseSchedule(tables(schedule, T).alphas_cumprod[:-1]), k).numpy()


@every_schedule
@pytest.mark.parametrize("k", [1.0, 2.0, 3.0])
def test_bell_has_its_mass_per_unit_of_log_sigma(schedule, T, k):
    """The share of sum_t c_t in each stretch of timesteps = that of the integral over its stretch of log sigma."""
    abar = alphas_cumprod(schedule, T)[:-1]  # the last may have infinite sigma
    log_sigma = 0.5 * np.log((1 - abar) / abar)
    grid = np.linspace(-12, 30, 400001)
    integral = np.cumsum((1 / (np.exp(grid) + np.exp(-grid))) ** k)  # sigma / (1 + sigma^2)
    edges = np.linspace(0, T - 2, 11).astype(int)
    expected = np.diff(np.interp(log_sigma[edges], grid, integral))
    c = bell_where_there_is_signal(schedule, T, k)
    cumulative = np.cumsum(c) - c / 2  # half of a timestep's mass lies below it
    share = np.diff(cumulative[edges])
    np.testing.assert_allclose(share / share.sum(), expected / expected.sum(), atol=4e-3 if T > 50 else 2e-2)


@every_schedule
def test_bell_closed_forms(schedule, T):
    abar = alphas_cumprod(schedule, T)
    noise_gained = -np.gradient(abar)  # k = 2: c_t ∝ -d abar / dt
    np.testing.assert_allclose(weightings.bell(tables(schedule, T)), noise_gained / noise_gained.mean(), rtol=1e-6)
    assert float(weightings.bell(tables(schedule, T)).mean()) == pytest.approx(1)
    turned = np.gradient(np.arccos(np.sqrt(abar[:-1])))[1:-1]  # k = 1: uniform in the angle
    c = bell_where_there_is_signal(schedule, T, 1.0)[1:-1]
    curved = np.abs(c / c.mean() / (turned / turned.mean()) - 1)
    assert np.quantile(curved, 0.9) < 0.02  # the two finite differences differ where the schedule bends most


# ------------------------------------------------------------------------------------------ the papers' formulas: SpeeD


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
    sampler = make("speed", schedule, T, "change_aware")
    np.testing.assert_allclose(sampler.probabilities, density, rtol=1e-4)
    np.testing.assert_allclose(sampler.weights, weights, rtol=1e-5)
    assert sampler.weights[:tau].min() == pytest.approx(0.4)
    assert sampler.weights[:tau].max() == pytest.approx(0.6)
    assert (sampler.weights[tau:] == 1).all()


def test_speeds_boundary_on_ddpms_own_schedule():
    """Where d sqrt(1 - abar) / dt falls under 1e-4; the paper says about 700."""
    tau = int((make("speed", weighting="change_aware").weights != 1).nonzero().max()) + 1
    assert tau == speed_by_hand("linear", 1000)[0]
    assert 600 < tau < 750


def test_speed_draws_come_in_mirrored_pairs():
    sampler = make("speed", low_discrepancy=False)
    for timesteps in draws(sampler, 32, 5):
        left = sorted(timesteps.tolist())
        mirrors = [641 - t if t < 641 else t - 641 for t in left]
        assert sum(left.count(m) > 0 for m in mirrors) >= 16  # a drawn t's mirror is there; a mirror's may not be


@pytest.mark.parametrize("ceiling", [0.6, 0.8])
def test_change_aware_range(ceiling):
    c = weightings.change_aware(tables(), ceiling)
    assert float(c[:641].min()) == pytest.approx(1 - ceiling)
    assert float(c[:641].max()) == pytest.approx(ceiling)
    assert (c[641:] == 1).all()
    assert int(c[:641].argmax()) == int(np.argmax(np.gradient(1 - alphas_cumprod())))


# ------------------------------------------------------------------------------------- the papers' formulas: log-normal


def log_sigma_edges(schedule, T):
    """[T + 1] the points half-way between neighbouring timesteps' log sigma; the outer ones as far out again."""
    with np.errstate(divide="ignore"):
        log_sigma = 0.5 * (np.log(1 - alphas_cumprod(schedule, T)) - np.log(alphas_cumprod(schedule, T)))
    inner = (log_sigma[1:] + log_sigma[:-1]) / 2
    end = log_sigma[-1] + (log_sigma[-1] - inner[-1]) if np.isfinite(log_sigma[-1]) else np.inf
    return np.concatenate([[log_sigma[0] - (inner[0] - log_sigma[0])], inner, [end]])


def normal_mass(schedule, T):
    return np.diff(norm.cdf(log_sigma_edges(schedule, T), loc=-1.2, scale=1.2))


@every_schedule
def test_log_normal_density_against_the_normal_distribution(schedule, T):
    mass = normal_mass(schedule, T)
    np.testing.assert_allclose(make("log_normal", schedule, T).probabilities, mass / mass.sum(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("schedule", "T"), [("linear", 1000), ("squaredcos_cap_v2", 1000), ("squaredcos_cap_v2", 50)])
def test_log_normal_density_against_edms_own_continuous_draws(schedule, T):
    log_sigma = np.random.default_rng(0).normal(-1.2, 1.2, 200000)
    edges = log_sigma_edges(schedule, T)
    inside = log_sigma[(log_sigma > edges[0]) & (log_sigma < edges[-1])]
    own = 0.5 * np.log(1 / alphas_cumprod(schedule, T) - 1)
    after = np.searchsorted(own, inside).clip(1, T - 1)
    nearest = np.where(inside - own[after - 1] < own[after] - inside, after - 1, after)
    statistic, dof = chi_square(torch.from_numpy(nearest), make("log_normal", schedule, T).probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_uniform_is_uniform_and_adaptive_begins_so():
    for kind in (UniformSampler, AdaptiveSampler):
        assert torch.allclose(kind(tables()).probabilities, torch.tensor(1e-3))
