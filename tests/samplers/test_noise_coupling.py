"""Which noise goes with which image: independent, opposite in pairs, or the nearest of several."""

from functools import partial

import pytest
import torch
from sampler_helpers import T, digits, scheduler, tables

from samplers import METHODS, NOISE_COUPLINGS, UniformSampler, antithetic, immiscible, make_timestep_sampler
from samplers.noise_coupling import opposite_randn


def sampler_with(coupling, **options):
    return make_timestep_sampler(scheduler(), "ddpm", noise_coupling=coupling, **options)


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
    noise = opposite_randn(batch_size, 3, 64, 64, generator=seeded())
    assert noise.shape == (batch_size, 3, 64, 64)
    pairs = batch_size // 2
    assert torch.equal(noise[:pairs], -noise[batch_size - pairs :])
    assert len(noise.flatten(1).unique(dim=0)) == batch_size  # and nothing else is repeated
    assert float(noise[0].std()) == pytest.approx(1, abs=0.03)
    images = torch.zeros(batch_size, 3, 64, 64)
    assert torch.equal(sampler_with("antithetic").noise(images, seeded()), noise)


@pytest.mark.parametrize(("options", "k"), [({}, 4), ({"num_candidates": 7}, 7)])
def test_immiscible_noise_is_the_nearest_of_four_to_its_image_or_of_as_many_as_told(options, k):
    images = digits(32)
    noise = sampler_with("immiscible", **options).noise(images, seeded())
    candidates = torch.randn(32, k, 1, 8, 8, generator=seeded())
    for image, chosen, of in zip(images, noise, candidates, strict=True):
        nearest = min(of, key=lambda candidate: float((candidate - image).square().sum()))
        assert torch.equal(chosen, nearest)


def test_immiscible_distances_are_in_float32():
    """In bfloat16, 256 less noise of any size up to 1 is 256."""
    noise = sampler_with("immiscible").noise(torch.full((32, 1, 8, 8), 256.0, dtype=torch.bfloat16), seeded())
    candidates = torch.randn(32, 4, 1, 8, 8, generator=seeded(), dtype=torch.bfloat16)
    nearest = (256 - candidates.double()).square().sum((2, 3, 4)).argmin(1)
    assert torch.equal(noise, candidates[torch.arange(32), nearest])


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
    not_independent = {name for name, coupling in coupled.items() if coupling != "independent"}
    assert not_independent == {"adaptive", "immiscible"}


def test_a_coupling_takes_its_own_options_alone():
    with pytest.raises(ValueError, match="'uniform' has no option 'num_candidates'"):
        sampler_with("antithetic", num_candidates=7)
    with pytest.raises(ValueError, match="num_candidates must be an integer of at least 1, not 0"):
        sampler_with("immiscible", num_candidates=0).noise(torch.zeros(2, 1, 8, 8))


def test_a_coupling_may_be_any_callable_and_its_options_are_part_of_the_state():
    class Shifted:
        def __call__(self, images, draw):
            return images + draw(torch.randn, *images.shape)

    couplings = [partial(immiscible, num_candidates=2), Shifted(), immiscible]
    samplers = [UniformSampler(tables(), noise_coupling=coupling) for coupling in couplings]
    names = [sampler.state_dict()["noise_coupling"] for sampler in samplers]
    assert names == ["immiscible(num_candidates=2)", "Shifted", "immiscible"]
    with pytest.raises(ValueError, match=r"its noise_coupling is immiscible\(num_candidates=2\), not immiscible"):
        samplers[2].load_state_dict(samplers[0].state_dict())


def test_whoever_couples_in_pairs_gets_neighbouring_timesteps():
    def mine(images, draw):
        return antithetic(images, draw)

    mine.in_pairs = True
    for coupling, is_paired in ((mine, True), (antithetic, True), (immiscible, False)):
        first, second = UniformSampler(tables(), noise_coupling=coupling).sample(50).timesteps.view(2, 25)
        assert ((first - second).abs().max() <= T / 50 + 1) == is_paired
