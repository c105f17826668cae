"""Which noise goes with which image: independent, opposite in pairs, or the nearest of several."""

import pytest
import torch
from sampler_helpers import digits, scheduler

from samplers import METHODS, NOISE_COUPLINGS, antithetic_randn, make_timestep_sampler


def sampler_with(coupling):
    return make_timestep_sampler(scheduler(), "ddpm", noise_coupling=coupling)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_independent_noise_is_what_randn_like_draws():
    images = torch.zeros(5, 2, 3, 3)
    torch.manual_seed(3)
    expected = torch.randn_like(images)
    torch.manual_seed(3)
    assert torch.equal(sampler_with("independent").noise(images), expected)


@pytest.mark.parametrize("batch_size", [1, 6, 7])
def test_antithetic_noise_is_gaussian_and_opposite(batch_size):
    noise = antithetic_randn(batch_size, 3, 64, 64, generator=seeded())
    assert noise.shape == (batch_size, 3, 64, 64)
    pairs = batch_size // 2
    assert torch.equal(noise[:pairs], -noise[batch_size - pairs :])
    assert len(noise.flatten(1).unique(dim=0)) == batch_size  # and nothing else is repeated
    assert float(noise[0].std()) == pytest.approx(1, abs=0.03)
    images = torch.zeros(batch_size, 3, 64, 64)
    assert torch.equal(sampler_with("antithetic").noise(images, seeded()), noise)


def test_immiscible_noise_is_the_nearest_of_four_to_its_image():
    images = digits(32)
    noise = sampler_with("immiscible").noise(images, seeded())
    candidates = torch.randn(32, 4, 1, 8, 8, generator=seeded())
    for image, chosen, of in zip(images, noise, candidates, strict=True):
        nearest = min(of, key=lambda candidate: float((candidate - image).square().sum()))
        assert torch.equal(chosen, nearest)


def test_immiscible_noise_leans_towards_its_image_and_the_others_do_not():
    images = digits(512)
    cosines = {}
    for name in NOISE_COUPLINGS:
        noise = sampler_with(name).noise(images, seeded())
        cosines[name] = torch.cosine_similarity(noise.flatten(1), images.flatten(1)).mean()
    assert cosines["immiscible"] > 0.1  # E[max of 4 normals] / sqrt(64) = 0.129
    assert cosines["independent"].abs() < 0.02 > cosines["antithetic"].abs()


def test_only_our_own_method_and_one_that_is_named_after_it_have_a_coupling():
    coupled = {name: method.noise_coupling for name, method in METHODS.items()}
    assert {name for name, coupling in coupled.items() if coupling != "independent"} == {"adaptive", "immiscible"}
