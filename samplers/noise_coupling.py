"""Which noise goes with which image of a batch: a part of a method beside its sampler, weighting and filter."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from .checks import check_counts
from .processes import rank_and_world_size

logger = logging.getLogger(__name__)

DrawNoise = Callable[..., torch.Tensor]  # (randn, batch_size, *shape) -> randn(batch_size, *shape), on the right device
# (images, draw) -> noise; both [B, ...]. Of one with a true attribute `in_pairs`, examples i and B / 2 + i belong
# together: a sampler draws neighbouring timesteps for them.
NoiseCoupling = Callable[[torch.Tensor, DrawNoise], torch.Tensor]


def independent(images: torch.Tensor, draw: DrawNoise) -> torch.Tensor:
    """Gaussian noise that does not look at the images: DDPM's."""
    return draw(torch.randn, *images.shape)


def antithetic(images: torch.Tensor, draw: DrawNoise) -> torch.Tensor:
    """The second half of a batch has minus the noise of the first.

    A `TimestepSampler` draws neighbouring timesteps for the two of a pair. An example's gradient depends on its noise
    much as its neighbour's does, most of all on the noise's mean over the image, whatever the images are; in the sum of
    the two, this part of the gradient's variance cancels. Each noise is still Gaussian given its image, so the expected
    gradient is the same.
    """
    return draw(opposite_randn, *images.shape)


antithetic.in_pairs = True


def immiscible(images: torch.Tensor, draw: DrawNoise, *, num_candidates: int = 4) -> torch.Tensor:
    """Of some noises for each image, the one nearest to it: KNN noise selection of Improved Immiscible Diffusion (Li et
    al. 2025, arXiv 2505.18521, github.com/yhli123/Immiscible-Diffusion).

    Given its image, the noise is no longer Gaussian: it leans towards the image, so that the network learns another
    E[eps | x_t] than the one that ancestral sampling and its Gaussian start are derived for. The fewer dimensions an
    image has, the more. Distances are in float32, where the authors' code has float16.

    Args:
        num_candidates: k, noises drawn for an image, 1 or more: 4 in the authors' flow matching on CIFAR-10, 64 in
            their Stable Diffusion.
    """
    check_counts(num_candidates=num_candidates)
    candidates = draw(torch.randn, len(images), num_candidates, *images.shape[1:])
    distances = (images.unsqueeze(1).float() - candidates.float()).flatten(2).norm(dim=2)
    return candidates[torch.arange(len(images), device=images.device), distances.argmin(1)]


def opposite_randn(batch_size: int, *shape: int, **options: Any) -> torch.Tensor:
    """`torch.randn`, in which the second half of the batch is minus the first."""
    half = torch.randn((batch_size + 1) // 2, *shape, **options)
    return torch.cat([half, -half])[:batch_size]


def warn_of_odd_batch(batch_size: int) -> None:
    """Warn, once, where one of several processes draws noise for an odd batch: it cannot keep the pairs of it."""
    if batch_size % 2 and rank_and_world_size()[1] > 1:
        _warn()


@functools.cache  # once
def _warn():
    logger.warning(
        "opposite noise in pairs: on several processes, each needs an even batch; of an odd one, the two examples that "
        "sampler.sample pairs are on different processes, and their noise is not opposite"
    )
