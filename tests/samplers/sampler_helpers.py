"""Noise schedules, samplers as training has them, and what is asked of every one of them."""

import contextlib
import functools
import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

from images import open_images
from samplers import FROM_IMAGES, LOSS_WEIGHTINGS, TIMESTEP_SAMPLERS, NoiseSchedule, Spectrum, make_timestep_sampler

torch.set_num_threads(1)  # the tensors are small: threads only wait for each other
T = 1000
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero_snr": {"rescale_betas_zero_snr": True},
}
LENGTHS = (1000, 4000, 50)
SCHEDULES_AND_LENGTHS = tuple(itertools.product(SCHEDULES, LENGTHS))
WEIGHTING_OF = {name: "none" for name in TIMESTEP_SAMPLERS} | {"adaptive": "bell"}
RIVALS = ("loss_second_moment", "uncertainty", "adaptive_log_snr", "info_noise")  # that learn from losses alone


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


def log_sigma_edges(schedule, T):
    """[T + 1] the points half-way between neighbouring timesteps' log sigma; the outer ones as far out again."""
    with np.errstate(divide="ignore"):
        log_sigma = 0.5 * (np.log(1 - alphas_cumprod(schedule, T)) - np.log(alphas_cumprod(schedule, T)))
    inner = (log_sigma[1:] + log_sigma[:-1]) / 2
    end = log_sigma[-1] + (log_sigma[-1] - inner[-1]) if np.isfinite(log_sigma[-1]) else np.inf
    return np.concatenate([[log_sigma[0] - (inner[0] - log_sigma[0])], inner, [end]])


def normal_mass(schedule, T):
    return np.diff(norm.cdf(log_sigma_edges(schedule, T), loc=-1.2, scale=1.2))


def nearest_timesteps(log_sigma, schedule, T):
    """[n] int64 the timesteps whose noise levels are nearest, of continuous draws that lie in the schedule's range."""
    log_sigma, edges = np.asarray(log_sigma), log_sigma_edges(schedule, T)
    inside = log_sigma[(log_sigma > edges[0]) & (log_sigma < edges[-1])]
    return torch.from_numpy(np.searchsorted(edges, inside) - 1)


def assert_drawn_from(probabilities, timesteps):
    statistic, dof = chi_square(timesteps, probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


def falling_loss(T):
    """[T] a mean loss as training shows it: large at the clean end, small at the noisy end."""
    return 0.02 + torch.exp(-5 * torch.arange(T) / T)


def residual_loss(variance=0.25):
    """[T] a mean loss as a trained network of the noise shows it: for images of this variance the least there is,
    var / (sigma^2 + var), and 0.003 that such a network does not get rid of."""
    return variance / (tables().sigma ** 2 + variance) + 0.003


def train_on(sampler, mean_loss, num_updates, batch_size):
    """Show a sampler losses of this mean [T] at the timesteps that it draws."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_updates):
        t = sampler.sample(batch_size).timesteps
        sampler.update(t, mean_loss[t].float() * squares(generator, batch_size))
    return sampler


def squares(generator, *shape):
    """Losses of mean 1, as spread as a mean of four squares."""
    return torch.randn(4, *shape, generator=generator).square().mean(0)


def random_images():
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def images_of(batch_size, seed=0, channels=1, size=8):
    return torch.rand(batch_size, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def weighting_table(name, schedule):
    """Of `random_images`, which reach beyond what DDPMScheduler clips to: they are taken for latents."""
    schedule = schedule.unclipped()
    data = [Spectrum.of(random_images()).variances.flatten()] if name in FROM_IMAGES["loss_weighting"] else []
    return LOSS_WEIGHTINGS[name](schedule, *data)


def make_sampler(name, weighting="none", **options):
    options = {"error_filter": "none", "images": random_images(), **options}
    return make_timestep_sampler(scheduler(), timestep_sampler=name, loss_weighting=weighting, **options)


def begin(sampler):
    """Draw, which must come before an update, and leave the draws that follow as they would have been."""
    num_draws = sampler.num_draws
    sampler.sample(1)
    sampler.num_draws = num_draws
    return sampler


def adapt(sampler, mean_loss=None):
    """Show an adaptive sampler its mean loss at every timestep, exactly, until it renews its density."""
    T = sampler.num_train_timesteps
    mean_loss = falling_loss(T) if mean_loss is None else mean_loss
    begin(sampler)
    for _ in range(getattr(sampler, "refresh_every", 1)):
        sampler.update(torch.arange(T, device=sampler.device), mean_loss.to(sampler.device))
    return sampler


def make_adapted(name, schedule="linear", T=1000, weighting=None, **options):
    """A sampler as it is in mid-training: the adaptive one has adapted."""
    weighting = weighting or WEIGHTING_OF[name]
    noise_scheduler = scheduler(schedule, T)
    options = {"images": random_images(), **options}
    return adapt(make_timestep_sampler(noise_scheduler, timestep_sampler=name, loss_weighting=weighting, **options))


def draws(sampler, batch_size, num_batches):
    """[num_batches, batch_size]"""
    return torch.stack([sampler.sample(batch_size).timesteps for _ in range(num_batches)])


def chi_square(timesteps, probabilities, per_bin=20):
    """(statistic, degrees of freedom) on neighbouring timesteps merged until about `per_bin` draws are expected."""
    expected = probabilities.double() * timesteps.numel()
    bins = ((expected.cumsum(0) - expected / 2) / per_bin).long().unique(return_inverse=True)[1]
    observed = torch.bincount(bins[timesteps.flatten()], minlength=int(bins.max()) + 1).double()
    expected = torch.zeros_like(observed).index_add_(0, bins, expected)
    return float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1


def total_variation(p, q):
    return float((p.double() - q.double()).abs().sum() / 2)


def uniform_density():
    return torch.full((T,), 1 / T)


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
    rows = [(schedule, T) for schedule, T in SCHEDULES_AND_LENGTHS if condition(schedule, T)]
    return pytest.mark.parametrize(("schedule", "T"), rows, ids=[f"{schedule}-{T}" for schedule, T in rows])


every_schedule = schedules()
every_schedule_with_signal = schedules(lambda schedule, T: alphas_cumprod(schedule, T)[-1] > 0)
every_converging_schedule = schedules(lambda schedule, T: not never_converges(schedule, T))
every_sampler = pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)


def allowed_combinations():
    """(name, schedule, T): every sampler with every noise schedule, at lengths that take turns, so that it sees all of
    them; SpeeD, whose boundary depends on both, with every one that it allows."""
    for (i, name), (j, schedule) in itertools.product(enumerate(TIMESTEP_SAMPLERS), enumerate(SCHEDULES)):
        if name == "speed":
            yield from ((name, schedule, T) for T in LENGTHS if not never_converges(schedule, T))
        else:
            yield name, schedule, LENGTHS[(i + j) % len(LENGTHS)]


allowed = pytest.mark.parametrize(
    ("name", "schedule", "T"),
    [pytest.param(*combination, id="-".join(map(str, combination))) for combination in allowed_combinations()],
)


def digits(count=512):
    return open_images("digits", resolution=8).sample(count)


def moved_by_an_error(beta_schedule, variances, at, kind=DDPMScheduler):
    """[len(at), K] how far a unit error in eps at t moves the components of a finished image: by diffusers' own
    ancestral sampling (or DDIM's ODE) of Gaussian data of these variances, with the perfect network."""
    scheduler = kind(T, beta_schedule=beta_schedule, clip_sample=False)
    if kind is DDIMScheduler:
        scheduler.set_timesteps(T)
    abar = scheduler.alphas_cumprod.double()

    def finished(error_at):
        generator, x = torch.Generator().manual_seed(0), torch.ones(1, len(variances), dtype=torch.float64)
        for t in range(T - 1, -1, -1):
            eps = (1 - abar[t]).sqrt() * x / (variances * abar[t] + 1 - abar[t]) + 1.0 * (t == error_at)
            x = scheduler.step(eps, t, x, generator=generator).prev_sample
        return x[0]

    undisturbed = finished(None)
    return torch.stack([finished(t) - undisturbed for t in at])
