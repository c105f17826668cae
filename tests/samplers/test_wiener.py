"""The Wiener filter, against what an error's components do to a finished image."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from sampler_helpers import T, digits, moved_by_an_error, tables

from samplers import NoiseSchedule, Spectrum, WienerFilter, mean_squares
from samplers.spectrum import component_powers


def smooth_images(count=256, size=8):
    """Coloured noise with a steep spectrum and correlated channels."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.fft.fftfreq(size) * size
    amplitude = 1 / (0.3 + frequencies[:, None].square() + frequencies.square())
    white = torch.randn(count, 3, size, size, generator=generator)
    mixed = white + 0.8 * white.mean(1, keepdim=True)
    return torch.fft.ifft2(torch.fft.fft2(mixed) * amplitude).real


def wiener(images, beta_schedule="linear", **options):
    return WienerFilter(tables(beta_schedule, T), Spectrum.of(images), **options)


def waves(spectrum, axis, frequency):
    """[1, C, H, W] a unit error in one component."""
    C, H, W = spectrum.variances.shape
    component = torch.zeros(1, C, H, W, dtype=torch.complex128)
    component[0, axis, frequency[0], frequency[1]] = 1
    wave = torch.fft.ifft2(component, norm="ortho").real
    wave = torch.einsum("ac,nahw->nchw", spectrum.axes, wave)
    return wave / wave.square().sum().sqrt()


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("kind", "exponent", "power"), [(DDPMScheduler, 2.0, 1.0), (DDIMScheduler, 1.0, 1.0), (DDIMScheduler, 1.0, 0.5)]
)
def test_an_errors_component_counts_the_square_of_what_it_does_to_the_finished_image(
    kind, exponent, power, beta_schedule
):
    """The ratio of two components' losses at the same t, against diffusers' own sampling; or of their shares of the
    amplitudes, of power 1/2."""
    spectrum = Spectrum.of(smooth_images())
    chosen = [(2, (0, 0)), (2, (0, 1)), (2, (2, 2)), (0, (1, 0))]
    variances = torch.stack([spectrum.variances[axis][frequency] for axis, frequency in chosen])
    at = [30, 100, 250, 400, 550, 700, 850]
    moved = moved_by_an_error(beta_schedule, variances, at, kind).square() / variances ** (1 - power)
    loss = wiener(smooth_images(), beta_schedule, plain_fraction=1e-9, exponent=exponent, power=power)
    counts = torch.stack(
        [
            loss(waves(spectrum, *component).float().expand(len(at), -1, -1, -1), torch.tensor(at))
            for component in chosen
        ],
        dim=1,
    )
    ours, theirs = (values / values.sum(1, keepdim=True) for values in (counts.double(), moved))
    np.testing.assert_allclose(ours, theirs, rtol=0.06, atol=1e-6)


@pytest.mark.parametrize(("exponent", "power"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("plain_fraction", [0.1, 0.5, 1.0])
def test_the_best_linear_denoiser_has_the_loss_that_it_has_in_plain_mean_squares(plain_fraction, exponent, power):
    """On Gaussian data of that spectrum: sum_i v_i K_i = sum_i K_i, here by 4,000 draws of it at each of some t."""
    spectrum = Spectrum.of(smooth_images())
    loss = wiener(smooth_images(), plain_fraction=plain_fraction, exponent=exponent, power=power)
    abar = tables().alphas_cumprod
    generator = torch.Generator().manual_seed(1)
    for t in (20, 200, 500, 900):
        gains = abar[t] * spectrum.variances / (abar[t] * spectrum.variances + 1 - abar[t])
        white = torch.randn(4000, 3, 8, 8, generator=generator, dtype=torch.float64)
        components = torch.fft.fft2(white, norm="ortho") * gains.sqrt()  # of eps - E[eps | x_t], of variance K_i
        errors = torch.einsum("ac,nahw->nchw", spectrum.axes, torch.fft.ifft2(components, norm="ortho").real)
        filtered = loss(errors, torch.full((4000,), t)).mean()
        assert float(filtered) == pytest.approx(float(mean_squares(errors).mean()), rel=0.05)


def test_a_plain_fraction_of_one_and_white_data_are_plain_mean_squares():
    errors, t = torch.randn(64, 1, 8, 8), torch.arange(0, 960, 15)
    plain = mean_squares(errors)
    torch.testing.assert_close(wiener(digits(), plain_fraction=1.0)(errors, t), plain)
    white = Spectrum(torch.eye(1, dtype=torch.float64), torch.full((1, 8, 8), 0.3, dtype=torch.float64))
    torch.testing.assert_close(WienerFilter(tables(), white, plain_fraction=0.1)(errors, t), plain)


def test_the_flatter_the_spectrum_the_more_of_the_loss_is_plain_mean_squares():
    """Variances of 0.1 and 0.9 in equal numbers have a flatness of 0.6, and so f = 0.1 + 0.9 * 0.6; white ones 1."""
    variances = torch.tensor([0.1, 0.9], dtype=torch.float64)
    striped = Spectrum(torch.eye(1, dtype=torch.float64), variances.view(1, 2, 1).expand(1, 2, 4))
    assert WienerFilter(tables(), striped).plain_fraction == pytest.approx(0.64)
    white = Spectrum(torch.eye(1, dtype=torch.float64), torch.full((1, 8, 8), 0.3, dtype=torch.float64))
    assert WienerFilter(tables(), white).plain_fraction == pytest.approx(1.0)


@pytest.mark.parametrize("size", [7, 8])  # with an odd width, no frequency but 0 is its own opposite
def test_no_noise_is_plain_mean_squares_and_no_signal_has_finite_weights(size):
    spectrum = Spectrum.of(smooth_images(size=size))
    loss = WienerFilter(NoiseSchedule(torch.tensor([1.0, 0.5, 0.0]).double()), spectrum, plain_fraction=0.1)
    errors = torch.randn(3, 3, size, size, requires_grad=True)
    losses = loss(errors, torch.tensor([0, 1, 2]))
    losses.sum().backward()
    assert errors.grad.isfinite().all()
    torch.testing.assert_close(losses[0], mean_squares(errors)[0])
    fourth = spectrum.variances.square() * spectrum.variances.sum() / spectrum.variances.pow(3).sum()  # K ∝ s^2
    expected = ((0.9 * fourth + 0.1) * component_powers(errors[2:].double(), spectrum.axes)).mean()
    torch.testing.assert_close(losses[2].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(16,), (4, 8, 6), (3, 5, 7)])  # tokens, videos
def test_data_of_any_number_of_spatial_axes_have_their_filter(shape):
    """Its loss is the sum over all components by hand, in the whole transform."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 2, *shape, generator=generator).cumsum(-1) / 4
    spectrum, t = Spectrum.of(data), torch.tensor([30, 300, 600])
    errors = torch.randn(3, 2, *shape, generator=generator)
    assert spectrum.variances.shape == (2, *shape)
    losses = wiener(data, plain_fraction=0.2)(errors, t)
    for loss, error, abar in zip(losses, errors.double(), tables().alphas_cumprod[t], strict=True):
        gains = abar * spectrum.variances / (abar * spectrum.variances + 1 - abar)
        counts = 0.8 * gains.square() * gains.sum() / gains.pow(3).sum() + 0.2
        axes = torch.einsum("ac,c...->a...", spectrum.axes, error)
        components = torch.fft.fftn(axes, dim=tuple(range(1, error.ndim)), norm="ortho")
        assert float(loss) == pytest.approx(float((counts * components.abs().square()).mean()), rel=1e-4)


def test_relative_to_amplitudes_the_components_that_are_being_decided_count_most():
    """s / (s^2 + sigma^2) is largest at s = sigma. Components that do not vary at all count as the plain part alone."""
    variances = torch.logspace(-4, 2, 64, dtype=torch.float64).view(1, 8, 8)
    variances = (variances + variances.flip(1, 2).roll((1, 1), (1, 2))) / 2  # alike at opposite frequencies
    variances[0, 0, 0] = 0.0
    spectrum = Spectrum(torch.eye(1, dtype=torch.float64), variances)
    loss = WienerFilter(tables(), spectrum, plain_fraction=0.1, exponent=1.0, power=0.5)
    for t in (100, 300, 600):
        counts = {
            (i, j): float(loss(waves(spectrum, 0, (i, j)).float(), torch.tensor([t])))
            for i in range(8)
            for j in range(8)
        }
        assert counts[0, 0] == pytest.approx(0.1 / 64, rel=1e-3)
        most = max(counts, key=counts.get)
        distances = (variances[0].clamp_min(1e-9).log() / 2 - tables().sigma[t].log()).abs()
        assert float(distances[most]) == pytest.approx(float(distances.min()))


def test_filtered_losses_are_float32_within_autocast():
    loss, t = wiener(smooth_images()), torch.tensor([5, 100, 500, 900])
    errors = torch.randn(4, 3, 8, 8).bfloat16()
    expected = loss(errors.float(), t)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(errors, t), expected)


def test_errors_of_another_shape_and_bad_fractions_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 16, 16\], but the spectrum is of images of \[1, 8, 8\]"):
        wiener(digits())(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]))
    for fraction in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match=f"plain_fraction must be in .0, 1., not {fraction}"):
            wiener(digits(), plain_fraction=fraction)
    with pytest.raises(ValueError, match="exponent must be positive and finite, not 0"):
        wiener(digits(), exponent=0)
    with pytest.raises(ValueError, match=r"power must be in \[0, 1\], not -1"):
        wiener(digits(), power=-1)
