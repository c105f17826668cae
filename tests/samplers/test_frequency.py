"""k-diffusion's multiscale loss, against its own steps and another library's cosine transform."""

import functools

import numpy as np
import pytest
import torch
from sampler_helpers import make_sampler, scheduler
from scipy import fft

from samplers import make_timestep_sampler, mean_squares
from samplers.frequency import frequency

T = torch.arange(64)


def by_its_own_steps(errors):
    """As the code does it: a ramp of frequencies in cycles a pixel, the axes' least weight, on the squared DCT."""
    weights = []
    for axis, n in enumerate(errors.shape[2:]):
        weight = -np.log2(np.linspace(0.5 / n, 0.5, n))
        weights.append(weight.reshape([-1 if other == axis else 1 for other in range(errors.ndim - 2)]))
    weight = functools.reduce(np.minimum, weights)
    spatial = tuple(range(2, errors.ndim))
    squares = fft.dctn(errors, axes=spatial, norm="ortho") ** 2
    return (squares * weight).mean((1, *spatial)) / weight.mean()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 12), (4, 1, 5), (2, 9), (3, 4, 6, 5)])
def test_frequency_by_its_own_steps(shape):
    errors = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(frequency(errors, T), by_its_own_steps(errors.double().numpy()), rtol=1e-5)


def test_white_errors_have_their_mean_squares():
    errors = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert float(frequency(errors, T).mean()) == pytest.approx(float(mean_squares(errors).mean()), rel=0.02)


def test_an_error_counts_by_the_resolutions_at_which_it_is_seen():
    """An error in the mean of 8 x 8 pixels is seen at 8, 4, 2 and 1; from pixel to pixel of alternating sign, at 8."""
    mean = torch.ones(1, 1, 8, 8)
    finest = torch.from_numpy(fft.idct(np.eye(8), norm="ortho")[7]).float().view(1, 1, 1, 8).expand(1, 1, 8, 8)
    ratio = frequency(mean, T) / mean_squares(mean) / (frequency(finest, T) / mean_squares(finest))
    assert float(ratio) == pytest.approx(4, rel=1e-5)


def test_frequency_is_float32_within_autocast_and_has_a_gradient():
    errors = torch.randn(64, 3, 8, 8).bfloat16().requires_grad_()
    expected = frequency(errors.float(), T)
    with torch.autocast("cpu", torch.bfloat16):
        losses = frequency(errors, T)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert (errors.grad.flatten(1).norm(dim=1) > 0).all()


def test_it_needs_no_images_and_is_part_of_the_state():
    sampler = make_timestep_sampler(scheduler(), "frequency")
    errors = torch.randn(64, 1, 8, 8)
    torch.testing.assert_close(sampler.losses(errors, T), frequency(errors, T))
    with pytest.raises(ValueError, match="error_filter is frequency, not mean_squares"):
        make_sampler("uniform").load_state_dict(sampler.state_dict())
