"""The data's spectrum, and the weighting that is made from it, against what an error at t does to a finished image."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from sampler_helpers import T, digits, every_schedule, moved_by_an_error, tables

from samplers import Spectrum, make_timestep_sampler, weightings


def component_variances(images):
    """[K] in no order."""
    return Spectrum.of(images).variances.flatten()


def test_components_of_stationary_images_are_their_principal_components():
    """White noise blurred on a torus, in three mixed channels: against the eigenvalues of the full covariance."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.5, 0.2], [0.0, 0.6, 0.3], [0.0, 0.0, 0.2]], dtype=torch.float64)
    white = torch.randn(4000, 3, 6, 6, generator=generator, dtype=torch.float64)
    images = torch.einsum("cd,ndhw->nchw", mixing, white + white.roll(1, 2) + 0.5 * white.roll(1, 3)) + 0.3
    variances = component_variances(images).sort().values
    principal = torch.linalg.eigvalsh(torch.cov(images.flatten(1).T))
    assert len(variances) == 3 * 6 * 6
    assert float(variances.sum()) == pytest.approx(float(principal.sum()), rel=1e-9)
    upper = slice(54, None)  # the smallest are lost in what 4,000 images say about them
    np.testing.assert_allclose(variances[upper], principal[upper], rtol=0.25)


def test_variances_add_up_to_the_images_variance_whatever_the_batching():
    images = digits()
    variances = component_variances(images)
    assert float(variances.sum()) == pytest.approx(float(images.double().var(0).sum()), rel=1e-9)
    in_sevens = Spectrum.of(images, batch_size=7).variances.flatten()
    torch.testing.assert_close(in_sevens, variances, rtol=1e-9, atol=1e-12)
    assert float(variances.min()) >= 0


def test_flatness_is_1_of_white_data_and_falls_as_the_variances_part():
    """Of 0.1 and 0.9 in equal numbers: sqrt(0.1 * 0.9) / 0.5 = 0.6."""
    axes = torch.eye(1, dtype=torch.float64)
    for variances, flatness in (([0.3, 0.3], 1.0), ([0.1, 0.9], 0.6), ([0.1, 0.9, 0.0], 0.6)):
        spectrum = Spectrum(axes, torch.tensor(variances, dtype=torch.float64).view(1, 1, -1))
        assert spectrum.flatness == pytest.approx(flatness)
    for level in torch.rand(100, dtype=torch.float64):
        assert 1 - 1e-9 < Spectrum(axes, level.expand(1, 6, 7)).flatness <= 1
    white = torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert Spectrum.of(white).flatness == pytest.approx(1.0, abs=1e-2)


def test_grey_images_in_three_channels_are_as_flat_as_in_one():
    grey = digits()
    assert Spectrum.of(grey.expand(-1, 3, -1, -1)).flatness == pytest.approx(Spectrum.of(grey).flatness)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 1, 8, 8), torch.ones(16, 3, 8, 8), torch.full((4, 1, 8, 8), float("nan"))]
)
def test_images_that_do_not_vary_are_refused_with_the_parts_that_need_them(images):
    for method, parts in {
        "adaptive": "loss_weighting 'scaled_logit_normal' and error_filter 'wiener_ode'",
        "info_noise": "timestep_sampler 'info_noise'",
    }.items():
        with pytest.raises(ValueError, match=f"do not vary.*`images` are for {parts}: others need none"):
            make_timestep_sampler(DDPMScheduler(), method, images=images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            None,
            "no `images`, of which loss_weighting 'scaled_logit_normal' and error_filter 'wiener_ode' would be made",
        ),
        (torch.zeros(512, 64), r"\[N, C, H, W\].*not \[512, 64\]"),
        ((torch.zeros(16, 1, 8, 8), torch.zeros(16)), "not a tuple: .* give the images alone"),
        ([torch.zeros(16, 1, 8, 8), torch.zeros(16)], "not a list: .* give the images alone"),
        ({"images": torch.zeros(16, 1, 8, 8)}, "not a dict: .* give the images alone"),
        (torch.arange(256).byte().view(4, 1, 8, 8), r"not torch.uint8: of bytes, images / 127.5 - 1"),
        (torch.arange(256.0).view(4, 1, 8, 8), r"variance of 6827, .* give them in the range that the network sees"),
    ],
)
def test_images_that_the_network_does_not_see_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        make_timestep_sampler(DDPMScheduler(), "adaptive", images=images)


@pytest.mark.parametrize("deviation", [0.05, 1.0, 5.5])
def test_dark_images_and_latents_as_an_autoencoder_leaves_them_are_taken(deviation):
    images = deviation * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    variances = Spectrum.of(images).variances
    assert float(variances.mean()) == pytest.approx(deviation**2, rel=0.05)


@every_schedule
def test_white_data_of_unit_variance_give_the_bell(schedule, T):
    c = weightings.spectral(tables(schedule, T), torch.ones(5))
    np.testing.assert_allclose(c, weightings.bell(tables(schedule, T), k=2.0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("kind", "weighting"), [(DDPMScheduler, "spectral"), (DDIMScheduler, "spectral_ode")])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_weight_is_the_square_of_what_an_error_does_to_the_finished_image(kind, weighting, power, beta_schedule):
    """It moves by R_i(t), and sum_i R_i^2 = (2 d log sigma / dt) c_t, up to one factor for all t; or sum_i R_i^2 / s_i,
    relative to the amplitudes."""
    s2, at = torch.tensor([25.0, 4.0, 0.3, 0.02], dtype=torch.float64), [30, 100, 250, 400, 550, 700, 850]
    moved = (moved_by_an_error(beta_schedule, s2, at, kind).square() * s2 ** (power - 1)).sum(1)
    schedule = tables(beta_schedule, T)
    ratio = moved / (getattr(weightings, weighting)(schedule, s2, power) * schedule.log_sigma_slope)[at]
    np.testing.assert_allclose(ratio / ratio.mean(), np.ones(len(at)), atol=0.06)


def test_the_weight_for_both_ways_of_sampling_gives_each_a_third_and_one_to_all_alike():
    """c d log sigma / dt is a sum of what an error does by DDPM and of what it does by DDIM, relative to s_i, and 1."""
    s2, at = torch.tensor([25.0, 4.0, 0.3, 0.02], dtype=torch.float64), [30, 100, 250, 400, 550, 700, 850]
    kinds = (DDPMScheduler, DDIMScheduler)
    moved = [(moved_by_an_error("linear", s2, at, kind).square() / s2.sqrt()).sum(1) for kind in kinds]
    c = weightings.spectral_both(tables(), s2)
    of_both = ((c - 1 / 3) * tables().log_sigma_slope)[at]
    relative = torch.stack(moved, 1) / of_both[:, None]
    parts = torch.linalg.lstsq(relative, torch.ones(len(at), 1).double()).solution
    assert parts.min() > 0
    np.testing.assert_allclose((relative @ parts)[:, 0], np.ones(len(at)), atol=0.06)
    thirds = [alone(tables(), s2, power=0.5) / 3 for alone in (weightings.spectral, weightings.spectral_ode)]
    assert [float(third.mean()) for third in thirds] == pytest.approx([1 / 3, 1 / 3])
    torch.testing.assert_close(c, sum(thirds) + 1 / 3)


def test_larger_images_move_the_weight_to_higher_noise():
    """A smooth field at twice the resolution has larger low-frequency components: they are decided at more noise."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.fft.fftfreq(32) * 32
    amplitude = 1 / (1 + frequencies[:, None].square() + frequencies.square())
    large = torch.fft.ifft2(torch.fft.fft2(torch.randn(256, 1, 32, 32, generator=generator)) * amplitude).real
    large = large / large.std() / 2
    small = torch.nn.functional.avg_pool2d(large, 2)

    def centre(images):
        c = weightings.spectral(tables(), component_variances(images))
        return float((c * torch.arange(1000)).sum() / c.sum())

    assert centre(large) > centre(small) + 30


def test_a_batch_is_enough_of_the_data():
    a, b = (weightings.spectral(tables(), component_variances(digits(count))) for count in (64, 1797))
    assert float((a - b).abs().mean()) < 0.1  # of mean 1
