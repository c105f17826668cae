"""What is made from the data's spectrum: the spectral weighting and the Wiener filter, against what an error at t does
to a finished image."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from test_samplers import every_schedule, tables

from images import open_images
from samplers import NoiseSchedule, Spectrum, WienerFilter, make_timestep_sampler, mean_squares, weightings
from samplers.spectrum import component_powers

T = 1000


def digits(count=512):
    return open_images("digits", resolution=8).sample(count)


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


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 1, 8, 8), torch.ones(16, 3, 8, 8), torch.full((4, 1, 8, 8), float("nan"))]
)
def test_images_that_do_not_vary_are_refused(images):
    with pytest.raises(ValueError, match=r"do not vary.*--loss_weighting none --error_filter none"):
        Spectrum.of(images)


def test_missing_or_flattened_images_are_refused():
    with pytest.raises(ValueError, match="'spectral' with error_filter 'wiener' needs `images`"):
        make_timestep_sampler(DDPMScheduler(), "adaptive")
    with pytest.raises(ValueError, match=r"\[N, C, H, W\], not \[512, 64\]"):
        make_timestep_sampler(DDPMScheduler(), "adaptive", images=digits().flatten(1))


@every_schedule
def test_white_data_of_unit_variance_give_the_bell(schedule, T):
    c = weightings.spectral(tables(schedule, T), torch.ones(5))
    np.testing.assert_allclose(c, weightings.bell(tables(schedule, T), k=2.0), rtol=1e-6, atol=1e-9)


def moved_by_an_error(beta_schedule, variances, at):
    """[len(at), K] how far a unit error in eps at t moves the components of a finished image: by diffusers' own
    ancestral sampling of Gaussian data of these variances, with the perfect network."""
    scheduler = DDPMScheduler(T, beta_schedule=beta_schedule, clip_sample=False)
    abar = scheduler.alphas_cumprod.double()

    def finished(error_at):
        generator, x = torch.Generator().manual_seed(0), torch.ones(1, len(variances), dtype=torch.float64)
        for t in range(T - 1, -1, -1):
            eps = (1 - abar[t]).sqrt() * x / (variances * abar[t] + 1 - abar[t]) + 1.0 * (t == error_at)
            x = scheduler.step(eps, t, x, generator=generator).prev_sample
        return x[0]

    undisturbed = finished(None)
    return torch.stack([finished(t) - undisturbed for t in at])


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_weight_is_the_square_of_what_an_error_does_to_the_finished_image(beta_schedule):
    """It moves by R_i(t), and sum_i R_i^2 = (2 d log sigma / dt) c_t, up to one factor for all t."""
    s2, at = torch.tensor([25.0, 4.0, 0.3, 0.02], dtype=torch.float64), [30, 100, 250, 400, 550, 700, 850]
    moved = moved_by_an_error(beta_schedule, s2, at).square().sum(1)
    schedule = tables(beta_schedule, T)
    log_sigma_slope = torch.gradient(schedule.sigma.log())[0][at]
    ratio = moved / (weightings.spectral(schedule, s2)[at] * log_sigma_slope)
    np.testing.assert_allclose(ratio / ratio.mean(), np.ones(len(at)), atol=0.06)


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


# -------------------------------------------------------------------------------------------------- the Wiener filter


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
def test_an_errors_component_counts_the_square_of_what_it_does_to_the_finished_image(beta_schedule):
    """The ratio of two components' losses at the same t, against diffusers' own sampling."""
    spectrum = Spectrum.of(smooth_images())
    chosen = [(2, (0, 0)), (2, (0, 1)), (2, (2, 2)), (0, (1, 0))]
    variances = torch.stack([spectrum.variances[axis][frequency] for axis, frequency in chosen])
    at = [30, 100, 250, 400, 550, 700, 850]
    moved = moved_by_an_error(beta_schedule, variances, at).square()
    loss = wiener(smooth_images(), beta_schedule, plain_fraction=1e-9)
    counts = torch.stack(
        [
            loss(waves(spectrum, *component).float().expand(len(at), -1, -1, -1), torch.tensor(at))
            for component in chosen
        ],
        dim=1,
    )
    ours, theirs = (values / values.sum(1, keepdim=True) for values in (counts.double(), moved))
    np.testing.assert_allclose(ours, theirs, rtol=0.06, atol=1e-6)


@pytest.mark.parametrize("plain_fraction", [0.1, 0.5, 1.0])
def test_the_best_linear_denoiser_has_the_loss_that_it_has_in_plain_mean_squares(plain_fraction):
    """On Gaussian data of that spectrum: sum_i v_i K_i = sum_i K_i, here by 4,000 draws of it at each of some t."""
    spectrum = Spectrum.of(smooth_images())
    loss = wiener(smooth_images(), plain_fraction=plain_fraction)
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
    torch.testing.assert_close(WienerFilter(tables(), white)(errors, t), plain)


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
