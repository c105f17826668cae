"""k-diffusion's multiscale loss (K. Crowson, github.com/crowsonkb/k-diffusion, `freq_weight_nd` in layers.py)."""

import torch


def frequency(errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """[B] l = mean_i v_i |e_i|^2 / mean_i v_i, v_i = log2(2 n / (k + 1)): low frequencies count more.

    e_i are the components of the errors [B, C, H, W], or of any other spatial axes, in a cosine basis (DCT-II), k is a
    component's frequency on the axis of n pixels on which it is highest. v_i is the number of resolutions at which it
    is seen if an image is halved again and again: 1 for the finest detail, log2(2 n) for the mean. So l is a continuous
    form of simple diffusion's multiscale loss (Hoogeboom et al. 2023, arXiv 2301.11093), the sum over such resolutions,
    with which the code began.

    It is the nearest relative of `WienerFilter`: that one, too, lets errors of low frequencies count more, but as much
    more as the noise at t and the data's spectrum say; here it is the same at every timestep, on any data.

    Where this departs from the code: v is divided by its mean, so that white errors have their mean square. There it is
    limited by `scales`, which none of its configurations sets: its default 1 is the plain loss. Here it has no limit.
    """
    components, counts = errors.float(), torch.tensor(torch.inf, device=errors.device)
    for axis, n in enumerate(errors.shape[2:], 2):
        with torch.autocast(errors.device.type, enabled=False):
            components = (components.movedim(axis, -1) @ cosine_basis(n, errors.device).T).movedim(-1, axis)
        counts = torch.minimum(counts.unsqueeze(-1), octaves(n, errors.device))
    return (counts / counts.mean() * components.square()).flatten(1).mean(1)


def cosine_basis(n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[n, n] the orthonormal DCT-II: the wave of frequency k in row k."""
    k = torch.arange(n, device=device)
    waves = torch.cos(torch.pi / n * k[:, None] * (k + 0.5))
    return waves / waves.norm(dim=1, keepdim=True)


def octaves(n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[n] log2(2 n / (k + 1)): how often n pixels can be halved until the wave of frequency k is gone."""
    return -torch.log2(torch.arange(1, n + 1, device=device) / (2 * n))
