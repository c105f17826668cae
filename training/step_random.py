"""The random numbers of an update."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from images import ImageDataset
from samplers import NoiseCoupling, fold_seed


class StepRandom:
    """Random numbers that depend on the seed and the number of the step alone: a resumed run needs no state of them.

    Every process draws for all and takes its share, so a step does not depend on how many processes make it.

    Args:
        seed: of the run.
        accelerator: whose processes share the numbers out, and on whose device they are drawn.
        to_inputs: of the data set: makes the network's inputs of a batch.
        random_flip: whether half of the images are to be mirrored.
        class_dropout: how often a label is withheld; 1 for an unconditional network.
        null_label: the number of the null class, which then stands in its place; None of a network without classes.
    """

    def __init__(
        self,
        seed: int,
        accelerator: Accelerator,
        to_inputs: Callable[..., torch.Tensor] = ImageDataset.to_inputs,
        random_flip: bool = False,
        class_dropout: float = 0.0,
        null_label: int | None = None,
    ):
        self.to_inputs, self.random_flip = to_inputs, random_flip
        self.class_dropout, self.null_label = class_dropout, null_label
        self.seed, self.rank, self.world_size = seed, accelerator.process_index, accelerator.num_processes
        self.generator = torch.Generator(accelerator.device)

    def begin(self, step: int) -> None:
        """Go to the numbers of update number `step`."""
        self.generator.manual_seed(fold_seed(self.seed, step, stream=1))

    def inputs(self, batch: torch.Tensor) -> torch.Tensor:
        """float32 [B, C, H, W] what the network is trained on: images, mirrored at random; or latents, drawn at random
        from their posterior."""
        return self.to_inputs(batch, self.flips(len(batch)), lambda shape: self._share(torch.randn, *shape))

    def flips(self, count: int) -> torch.Tensor | None:
        """[count] bool, which images to mirror; or None. It draws in either case: the noise must not depend on it."""
        flips = self._share(torch.rand, count) < 0.5
        return flips if self.random_flip else None

    def noise(self, images: torch.Tensor, coupling: NoiseCoupling) -> torch.Tensor:
        """[B, ...] the noise of images [B, ...]. It is drawn for all processes' batches together, so that opposite
        noise is where the sampler pairs examples, also where B is odd and a pair is on two processes."""
        return coupling(images, self._share)

    def drop_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """[B] the labels of a batch, some of them withheld."""
        if self.null_label is None:
            return labels
        is_dropped = self._share(torch.rand, len(labels)) < self.class_dropout
        return labels.masked_fill(is_dropped, self.null_label)

    def _share(self, draw, batch_size: int, *shape: int) -> torch.Tensor:
        numbers = draw(batch_size * self.world_size, *shape, generator=self.generator, device=self.generator.device)
        return numbers[self.rank :: self.world_size]
