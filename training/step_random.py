"""The random numbers of an update."""

import torch
from accelerate import Accelerator

from samplers import antithetic_randn, fold_seed


class StepRandom:
    """Random numbers that depend on the seed and the number of the step alone: a resumed run needs no state of them.

    Every process draws for all and takes its share, so a step does not depend on how many processes make it.

    Args:
        seed: of the run.
        accelerator: whose processes share the numbers out, and on whose device they are drawn.
        random_flip: whether half of the images are to be mirrored.
    """

    def __init__(self, seed: int, accelerator: Accelerator, random_flip: bool):
        self.random_flip = random_flip
        self.seed, self.rank, self.world_size = seed, accelerator.process_index, accelerator.num_processes
        self.generator = torch.Generator(accelerator.device)

    def begin(self, step: int) -> None:
        """Go to the numbers of update number `step`."""
        self.generator.manual_seed(fold_seed(self.seed, step, stream=1))

    def flips(self, count: int) -> torch.Tensor | None:
        """[count] bool, which images to mirror; or None. It draws in either case: the noise must not depend on it."""
        flips = self._share(torch.rand, count) < 0.5
        return flips if self.random_flip else None

    def noise(self, shape: torch.Size, antithetic: bool) -> torch.Tensor:
        """Gaussian noise of `shape` [B, ...]; `antithetic`: the second half of the batch is minus the first."""
        return self._share(antithetic_randn if antithetic else torch.randn, *shape)

    def _share(self, draw, batch_size: int, *shape: int) -> torch.Tensor:
        numbers = draw(batch_size * self.world_size, *shape, generator=self.generator, device=self.generator.device)
        return numbers[self.rank :: self.world_size]
