"""Every sampler within a training step: it never waits for the device, and broken losses never poison it."""

import pytest
import torch
from sampler_helpers import (
    adapt,
    assert_same_state,
    every_sampler,
    images_of,
    make_adapted,
    make_sampler,
    no_host_sync,
    random_images,
    state_bits,
)

from samplers import TIMESTEP_SAMPLERS


@every_sampler
def test_losses_that_are_not_finite_never_poison(name):
    sampler = make_adapted(name)
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
    sampler = make_adapted(name, low_discrepancy=low_discrepancy)
    errors = torch.randn(32, *random_images().shape[1:], requires_grad=True)
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
    sampler = make_adapted(name, device="cuda")
    errors = torch.randn(32, *random_images().shape[1:], device="cuda", requires_grad=True)
    learn_from_a_step(sampler, errors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * getattr(sampler, "refresh_every", 1)):
            learn_from_a_step(sampler, errors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_sampler
def test_update_takes_losses_as_a_training_loop_has_them(name):
    reference, sampler = make_adapted(name), make_adapted(name)
    losses = (torch.arange(1000) % 8 / 8 + 0.5).bfloat16().requires_grad_()  # attached to a graph, in half precision
    adapt(reference, losses.detach().float())
    adapt(sampler, losses)
    assert_same_state(state_bits(sampler), state_bits(reference))
    assert not sampler.probabilities.requires_grad


@pytest.mark.parametrize("name", [name for name in TIMESTEP_SAMPLERS if name != "kim"])
def test_the_others_neither_look_at_images_nor_at_the_model(name):
    def denoising_loss(images, noise, timesteps):
        raise AssertionError("only a sampler that learns from an update's effect may ask")

    sampler, reference = make_sampler(name), make_sampler(name)
    images = images_of(8)
    assert torch.equal(sampler.sample(8, images=images).timesteps, reference.sample(8).timesteps)
    sampler.before_update(images, denoising_loss)
    sampler.after_update(denoising_loss)
    assert_same_state(state_bits(sampler), state_bits(reference))
