"""The loss by noise level on images that are not trained on: how far a run is, whatever its objective is."""

import torch
from accelerate import Accelerator

from samplers import fold_seed

from .denoiser import Denoiser
from .metrics import LossMeter

NUM_EXAMPLES = 1000  # 50 for each of twenty bins of timesteps
SEED = 0  # not the run's: the examples are the same in all runs


class ValidationLoss:
    """The plain epsilon-loss, by timestep bin, of fixed examples: images, timesteps and noise are the same at each time
    and in each run of the same data and number of timesteps, on any number of processes.

    Example i has image i modulo N in a random order, so that neighbouring timesteps have unlike images; timesteps are
    stratified, at equal distances from 0 to T.

    Args:
        images: [N, C, H, W] in [-1, 1], all there are or a sample of them.
        num_train_timesteps: T.
        batch_size: examples at a time.
    """

    def __init__(self, images: torch.Tensor, num_train_timesteps: int, batch_size: int, accelerator: Accelerator):
        self.images, self.accelerator, self.batch_size = images, accelerator, batch_size
        self.num_train_timesteps = num_train_timesteps
        order = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(SEED))
        self.image_numbers = order % len(images)
        self.timesteps = (torch.arange(NUM_EXAMPLES) * num_train_timesteps + num_train_timesteps // 2) // NUM_EXAMPLES

    def measure(self, network: torch.nn.Module, noise_scheduler) -> tuple[float | None, list[float | None]]:
        """(mean, [bins] means) of the epsilon-losses of a network on the accelerator's device. All processes must call
        it. Losses that are not finite are left out."""
        accelerator, device = self.accelerator, self.accelerator.device
        denoiser = Denoiser(network, noise_scheduler, device)
        meter = LossMeter(self.num_train_timesteps, device)
        share = torch.arange(accelerator.process_index, NUM_EXAMPLES, accelerator.num_processes)
        for numbers in share.split(self.batch_size):
            images = self.images[self.image_numbers[numbers]]
            noise = torch.stack([self._noise(number) for number in numbers.tolist()])
            timesteps = self.timesteps[numbers].to(device)
            losses = denoiser.epsilon_losses(images.to(device), timesteps, noise.to(device))
            meter.add_losses(timesteps, losses, losses)
        loss, _, loss_by_timestep = meter.read(accelerator)
        return loss, loss_by_timestep

    def _noise(self, number: int) -> torch.Tensor:
        """[C, H, W] drawn on the CPU, whose generator is the same everywhere."""
        generator = torch.Generator().manual_seed(fold_seed(SEED, number))
        return torch.randn(self.images.shape[1:], generator=generator)
