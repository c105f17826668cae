"""Grids of images."""

import numpy as np
import pytest
import torch

from pipelines import make_grid_image


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_shows_each_image_enlarged(channels, mode):
    images = torch.arange(5, dtype=torch.uint8).mul(50).view(5, 1, 1, 1).expand(5, channels, 8, 8)
    grid = make_grid_image(images, columns=3)
    assert grid.mode == mode
    assert grid.size == (3 * 66 + 2, 2 * 66 + 2)  # 64 pixels each, and two between
    middles = [np.array(grid)[2 + 66 * (i // 3) + 32, 2 + 66 * (i % 3) + 32] for i in range(5)]
    assert [int(np.max(middle)) for middle in middles] == [0, 50, 100, 150, 200]


def test_grid_sizes_and_refusals():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert make_grid_image(image, scale=2).size == (16, 16)
    assert make_grid_image(image.expand(10, 3, 8, 8), scale=1).size == (4 * 10 + 2, 3 * 10 + 2)
    for wrong in (image[:0], image[:, :2], image.float(), image[0]):
        with pytest.raises(ValueError, match="expected uint8"):
            make_grid_image(wrong)
