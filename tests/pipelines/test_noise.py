"""One stream of noise for each image."""

import pytest
import torch

from pipelines import unconditional
from pipelines.unconditional import image_generators, image_seed, noise_maps

CPU = torch.device("cpu")


def test_noise_is_the_same_bits_in_every_batch_and_new_at_every_step():
    shape, count = (1, 8, 8), 120  # three draws
    alone = torch.stack([m.clone() for m in noise_maps(image_generators(1, [5], CPU), shape, count, CPU)])
    both = torch.stack([m.clone() for m in noise_maps(image_generators(1, [9, 5], CPU), shape, count, CPU)])
    assert alone.shape == (count, 1, *shape)
    assert torch.equal(alone[:, 0], both[:, 1])
    assert len(torch.unique(alone[..., 0, 0])) == count
    assert abs(alone.mean()) < 0.05
    assert abs(alone.std() - 1) < 0.05


def test_large_images_draw_fewer_steps_at_once(monkeypatch):
    monkeypatch.setattr(unconditional, "NOISE_VALUES", 3 * 64)
    maps = noise_maps(image_generators(0, [0, 1], CPU), (1, 8, 8), 10, CPU)
    assert next(maps)._base.shape[1] == 3


def test_no_two_images_share_a_generator():
    seeds = {image_seed(seed, index) for seed in range(20) for index in range(1000)}
    assert len(seeds) == 20_000
    for seed in (0, 1, 2**32 - 1):  # the CPU generator reads the low 32 bits only
        assert len({image_seed(seed, index) & 0xFFFFFFFF for index in range(50_000)}) == 50_000
    for bad in ((-1, 0), (2**32, 0), (0, -1), (0, 2**32)):
        with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\)"):
            image_seed(*bad)
