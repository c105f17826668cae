"""One update of the network: what every step of training costs, and nothing else."""

import torch

from images import normalize
from samplers import antithetic_randn, fold_seed, mean_squares

from .ema import whole
from .models import epsilon_errors, epsilon_scale_of


class TrainingStep:
    """Timesteps and noise drawn, forward, backward, clipping, optimiser, average, statistics.

    Nothing in it waits for the device. Random numbers depend on the seed and the number of the step alone, alike for
    any number of processes.

    Args:
        accelerator: which `unet` and `optimizer` were prepared with.
        sampler: a `TimestepSampler`.
        ema: a `WeightAverage` of the network's parameters.
        guard, meter: a `NonFiniteGuard` and a `LossMeter`.
        seed: of flips and noise.
        random_flip: mirror half of the images.
        max_grad_norm: the gradient is clipped to it.
    """

    def __init__(
        self,
        accelerator,
        unet,
        noise_scheduler,
        sampler,
        optimizer,
        lr_scheduler,
        ema,
        guard,
        meter,
        *,
        seed,
        random_flip,
        max_grad_norm,
    ):
        self.accelerator, self.unet, self.noise_scheduler, self.sampler = accelerator, unet, noise_scheduler, sampler
        self.optimizer, self.lr_scheduler, self.ema = optimizer, lr_scheduler, ema
        self.guard, self.meter = guard, meter
        self.seed, self.random_flip, self.max_grad_norm = seed, random_flip, max_grad_norm
        self.epsilon_scale = epsilon_scale_of(noise_scheduler, accelerator.device)
        self.generator = torch.Generator(accelerator.device)

    def __call__(self, step, images):
        """Make update number `step` from uint8 `images` [B, C, H, W] on the device, B of all accumulated batches."""
        accelerator = self.accelerator
        self.generator.manual_seed(fold_seed(self.seed, step, stream=1))
        flips = self._draw_shared(torch.rand, images.shape[:1]) < 0.5
        images = normalize(images, flips if self.random_flip else None)
        drawn = self.sampler.sample(len(images), images=images)
        self.sampler.before_update(images, self._denoising_loss)
        noise = self._draw_shared(antithetic_randn if self.sampler.antithetic_noise else torch.randn, images.shape)
        step_losses = []
        for part in range(accelerator.gradient_accumulation_steps):
            share = slice(part, None, accelerator.gradient_accumulation_steps)
            clean_images, timesteps, weights = images[share], drawn.timesteps[share], drawn.weights[share]
            with accelerator.accumulate(self.unet):
                errors = self._epsilon_errors(clean_images, timesteps, noise[share])
                losses = self.sampler.losses(errors, timesteps)
                accelerator.backward((weights * losses).mean())
                step_losses.append(losses.detach())
                self.meter.add_losses(timesteps, weights * losses.detach(), mean_squares(errors.detach()))
                if accelerator.sync_gradients:
                    grad_norm = whole(accelerator.clip_grad_norm_(self.unet.parameters(), self.max_grad_norm))
                    self.meter.add_gradient_norm(grad_norm)
                    self.guard.observe(grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.sampler.update(drawn.timesteps, torch.stack(step_losses, dim=1).flatten())  # in the order of the draws
        self.sampler.after_update(self._denoising_loss)
        self.lr_scheduler.step()
        self.ema.step(self.unet.parameters())

    def _epsilon_errors(self, images, timesteps, noise):
        return epsilon_errors(self.unet, self.noise_scheduler, images, noise, timesteps, self.epsilon_scale)

    def _denoising_loss(self, images, timesteps, noise):
        """[N] the network's epsilon-losses as it is now, for a sampler that measures what an update changes."""
        self.unet.eval()
        with torch.no_grad():
            losses = mean_squares(self._epsilon_errors(images, timesteps, noise))
        self.unet.train()
        return losses

    def _draw_shared(self, draw, shape):
        """This process's share, of `shape`, of random numbers that every process draws for all of them, so that a step
        does not depend on how many processes share it. draw: torch.rand or torch.randn."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batch_size, *shape = shape
        numbers = draw(batch_size * world_size, *shape, generator=self.generator, device=self.generator.device)
        return numbers[rank::world_size]
