"""The spectrum of a data set: how much its images vary at each spatial frequency."""

import torch


def component_variances(images, batch_size=64):
    """[C * H * W] float64: the variances s_i^2 of the images' components, in no order.

    Components are the principal ones of stationary images: spatial frequencies, and for each the principal axes of its
    channels. (Principal components of the pixels would need no stationarity, but a matrix of (C H W)^2 entries.) Their
    sum is the variance of an image, about the mean image.

    Args:
        images: [N, C, H, W] in the range that the network is trained on, a random sample of the training data. 64 are
            enough for rough values of most components, 512 for good ones of all.
        batch_size: images transformed at a time.

    Raises:
        ValueError: the shape is another, or the images do not vary.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], not {list(images.shape)}")
    N, C, H, W = images.shape
    mean = images.mean(0, dtype=torch.float64).cpu()
    covariances = torch.zeros(H, W, C, C, dtype=torch.complex128)
    for some in images.split(batch_size):
        spectra = torch.fft.fft2(some.double().cpu() - mean, norm="ortho")
        covariances += torch.einsum("nchw,ndhw->hwcd", spectra, spectra.conj())
    variances = torch.linalg.eigvalsh(covariances / max(N - 1, 1)).clamp_min(0).flatten()
    if not 0 < variances.sum() < torch.inf:
        raise ValueError(
            f"the {N} training images do not vary (or are not finite), so they have no spectrum to weigh timesteps by: "
            "choose another loss weighting, such as --loss_weighting none"
        )
    return variances
