"""Devices without float64, Apple's: stood in for by the CPU, on which it is forbidden."""

import sys

import pytest
import torch
from sampler_helpers import chi_square, draws, make_adapted, random_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samplers import TIMESTEP_SAMPLERS, Spectrum, precision, spectrum
from samplers.precision import widest_float

NEED_FLOAT64 = ("uncertainty", "info_noise", "kim")  # for what they learn


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not any(torch.is_tensor(x) and x.dtype == torch.float64 for x in tree_leaves(result)), func
        return result


@pytest.fixture
def without_float64(monkeypatch):
    modules = [module for name, module in sys.modules.items() if name.startswith("samplers.")]
    for module in modules:
        if module is not precision and hasattr(module, "widest_float"):
            monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)


def test_which_devices_have_float64():
    assert widest_float(torch.device("mps")) is torch.float32
    assert {widest_float(torch.device(name)) for name in ("cpu", "cuda")} == {torch.float64}


@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("name", [name for name in TIMESTEP_SAMPLERS if name not in NEED_FLOAT64])
def test_a_step_needs_no_float64(without_float64, name, low_discrepancy):
    sampler = make_adapted(name, low_discrepancy=low_discrepancy)
    errors = torch.randn(32, *random_images().shape[1:])
    with NoFloat64():
        for _ in range(2 * getattr(sampler, "refresh_every", 1)):
            timesteps = sampler.sample(32).timesteps
            sampler.update(timesteps, sampler.losses(errors, timesteps))


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_in_float32_draws_have_the_stated_density(without_float64, low_discrepancy):
    sampler = make_adapted("adaptive", low_discrepancy=low_discrepancy)
    statistic, dof = chi_square(draws(sampler, 64, 400), sampler.probabilities)
    assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_in_float32_the_last_point_is_not_beyond_the_last_timestep(without_float64, monkeypatch):
    sampler = make_adapted("uniform")
    rand = torch.rand
    last = torch.tensor(1 - 2**-24)  # the last number below 1, of which torch.rand is capable
    monkeypatch.setattr(torch, "rand", lambda *size, **options: rand(*size, **options) * 0 + last)
    assert float((63 + last) / 64) == 1
    assert sampler.sample(64).timesteps.max() == 999


def test_the_spectrum_is_computed_where_there_is_float64(monkeypatch):
    images = random_images()
    expected = Spectrum.of(images)
    moved = []

    def to_cpu(tensor):
        moved.append(tensor.dtype)
        return tensor

    monkeypatch.setattr(spectrum, "widest_float", lambda device: torch.float32)
    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    assert all(torch.equal(a, b) for a, b in zip(Spectrum.of(images), expected, strict=True))
    assert moved[0] is torch.float32  # before anything is computed
