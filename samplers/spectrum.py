"""The spectrum of a data set: how much its images vary at each spatial frequency."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .precision import widest_float
from .schedule import NoiseSchedule

LARGEST_VARIANCE = 100.0  # images in [-1, 1] have at most 1, unscaled latents about 30, bytes thousands
VALUES_AT_A_TIME = 2**18  # of components and timesteps together: 2 MiB in double precision


class Spectrum(NamedTuple):
    """Components of the images, spatial frequencies on each principal axis of their channels, and their variances.

    They are uncorrelated in stationary images whose channels have the same axes at every frequency. (Principal
    components of the pixels would need neither, but a matrix of (C H W)^2 entries.)
    """

    axes: torch.Tensor  # [C, C] float64, orthonormal rows: the principal axes of the channels
    variances: torch.Tensor  # [C, H, W] float64: s_i^2 on each axis at each frequency, in the order of torch.fft.fftn

    @classmethod
    def of(cls, images: torch.Tensor, batch_size: int = 64) -> "Spectrum":
        """The spectrum of a data set, about its mean image.

        Args:
            images: [N, C, H, W] in the range that the network is trained on, a random sample of the training data; or
                with any other number of spatial axes, as [N, C, F, H, W] of videos. 64 are enough for rough values of
                most components, 512 for good ones of all.
            batch_size: images transformed at a time.

        Raises:
            ValueError: they are no tensor of this shape, are integers, do not vary, or vary so much that their range
                cannot be the network's.
        """
        if not torch.is_tensor(images):
            raise ValueError(
                f"images must be a tensor [N, C, H, W], not a {type(images).__name__}: of a dataloader's batch that "
                "holds labels too, give the images alone"
            )
        if images.ndim < 3:
            raise ValueError(f"images must be [N, C, H, W], or [N, C] and other axes, not {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floating-point numbers in the range that the network sees, not {images.dtype}: of "
                "bytes, images / 127.5 - 1"
            )
        if widest_float(images.device) is not torch.float64:
            images = images.cpu()
        N = len(images)
        mean = images.mean(0, dtype=torch.float64).cpu()

        def total(function):  # over the images, a batch of them at a time in double precision
            return sum(function(some.double().cpu() - mean) for some in images.split(batch_size))

        covariance = total(lambda some: torch.einsum("ncp,ndp->cd", some.flatten(2), some.flatten(2)))
        if not 0 < covariance.trace() < torch.inf:
            raise ValueError(
                f"the {N} training images do not vary (or are not finite), so they have no spectrum to train by: "
                "choose a method, or parts, that are not made from images"
            )
        if (variance := covariance.trace() / (N - 1) / images[0].numel()) > LARGEST_VARIANCE:
            raise ValueError(
                f"the pixels of the {N} training images have a variance of {float(variance):.4g}, where that of the "
                "noise is 1: give them in the range that the network sees, usually [-1, 1]"
            )
        axes = torch.linalg.eigh(covariance).eigenvectors.T
        return cls(axes, total(lambda some: component_powers(some, axes).sum(0)) / (N - 1))

    @property
    def flatness(self) -> float:
        """The geometric over the arithmetic mean of s_i^2, in [0, 1]: 1 of white data. "Spectral flatness", or Wiener
        entropy; 0.02 of CIFAR-10 at 16x16, 0.65 of the digits. Components that do not vary, as two of the axes of
        grey images in three channels, are left out."""
        variances = self.variances[self.variances > 1e-8 * self.variances.mean()]
        return min(float(variances.log().mean().exp() / variances.mean()), 1.0)  # not above, by rounding


def component_powers(
    images: torch.Tensor, axes: torch.Tensor, transform: Callable[..., torch.Tensor] = torch.fft.fftn
) -> torch.Tensor:
    """[N, C, H, W] the squared magnitudes of the components of `images` [N, C, H, W], of `axes` [C, C].

    Their sum over an image is the sum of its squared pixels. With torch.fft.rfftn as the transform, they are
    [N, C, H, W // 2 + 1]; the others are those of the opposite frequencies again.
    """
    on_axes = (axes @ images.flatten(2)).view(images.shape)
    components = transform(on_axes, dim=tuple(range(2, images.ndim)), norm="ortho")
    return torch.view_as_real(components).square().sum(-1)


def relative_gains(variances: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """K_i / abar_t = s_i^2 / (abar_t s_i^2 + 1 - abar_t), of the shape of `variances` and the noise level together.

    K_i = s_i^2 / (s_i^2 + sigma_t^2) is the gain of the best linear denoiser of x_t / sqrt(abar_t), Wiener's. Divided
    by abar_t it is defined without any signal too.

    Args:
        variances: s_i^2.
        signal, noise: abar_t and 1 - abar_t (given apart: the difference would be lost in float32).
    """
    return variances / (signal * variances + noise).clamp_min(1e-12)


def for_each_timestep(
    function: Callable[[torch.Tensor], torch.Tensor], variances: torch.Tensor, schedule: NoiseSchedule
) -> torch.Tensor:
    """[T] `function` of the `relative_gains` of all components: [N, K] -> [N], for N timesteps at a time."""
    variances = variances.flatten()
    timesteps_at_a_time = max(1, VALUES_AT_A_TIME // len(variances))
    tables = schedule.alphas_cumprod[:, None].split(timesteps_at_a_time)
    return torch.cat([function(relative_gains(variances, abar, 1 - abar)) for abar in tables])
