"""Kim et al. (CVPR 2025, arXiv 2411.09998): a policy network learns which timesteps' updates lower the VLB most."""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributions import Beta

from .adam import adam_step
from .base import DenoisingLoss, TimestepBatch, TimestepSampler, fold_seed
from .checks import check_counts, check_finite, check_positive
from .processes import rank_and_world_size
from .schedule import NoiseSchedule

CHANNELS, HIDDEN = (32, 64, 128), (256, 256)  # of the policy network


class KimSampler(TimestepSampler):
    """t = round((T - 1) x), x ~ pi_phi(. | x_0) = Beta(alpha, beta), (alpha, beta) = f_phi(x_0): a density for each
    image. Touches p_t alone, and changes the objective: w_t is the loss weighting (the paper's is `none`).

    Every 40 updates, Delta^t(x) = L_t(x; theta_k) - L_t(x; theta_k+1) is measured across the update, where L_t is the
    term of the VLB, beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) ‖eps - eps_theta‖^2 with sigma_t^2 = beta_t:
    - for every image x of the batch at the |S| = 3 timesteps t in S. The sum over S, plus 0.01 times the policy's
      entropy, is the reward R of the timestep that was drawn for x; phi ascends log pi_phi(t | x) R (REINFORCE);
    - for one image at all T timesteps. The last 20 such rows are a queue; S is the timesteps where Delta^t explains
      sum_t Delta^t best over the queue, by the F-test of a linear regression on each alone, i.e. the largest
      correlations. S = {0, 1, 2} until there are two rows.
    f_phi: three convolutions (32, 64, 128 channels, each with ReLU and pooling), two hidden layers of 256, softplus;
    at first Beta(0.97, 0.97) for every image. phi is trained by Adam at rate 0.01, gradient norms clipped at 1.

    A measurement runs the network on 2 (T + |S| B) images without gradients, where an update of B images costs about as
    much as 3 B: every N updates, it adds 2 (T + |S| B) / (3 B N) to each, 18 % for T = 1000, B = 128, N = 40.

    Constants are those of the authors' code for CIFAR-10 (github.com/ku-dmlab/Adaptive-Timestep-Sampler), where the
    noise schedule is `quad`, diffusers' `scaled_linear`. It needs `sample(..., images)`, `before_update` and
    `after_update`; without images, t is drawn from the mean policy, which is also what `probabilities` shows: of the
    images of the last measurement.

    Where this departs from that code:
    - the losses before and after use the same noise and no dropout; there each draws new noise and dropout, whose
      spread is then part of Delta;
    - S is a list of timesteps. There it becomes a list within a tuple when it is first renewed, of which
      `torch.full` then makes an error;
    - one process needs no process group; with many, the queue and phi are kept alike on all by reductions rather than
      in memory shared on one machine, and they are part of the checkpoint;
    - its every 40 updates start anew with each epoch, these do not;
    - images of other sizes than 32x32 are pooled to the same 4x4 features before the hidden layers.
    As there, the entropy is inside the reward and is differentiated too; its maximum is not sought on its own.
    Timesteps are independent draws, by image, from a stream of each process's own. Nothing waits for the device.

    Args:
        update_every: updates between two measurements.
        num_selected: |S|.
        queue_length: rows of Delta^t.
        entropy_coef: of the policy's entropy in the reward.
        learning_rate: of phi.
        max_grad_norm: of phi's gradient.
    """

    measures_model = True
    state_names = (
        "channels", "policy", "moments", "policy_steps", "falls", "num_falls", "selected", "updates",
    )  # fmt: skip

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        update_every: int = 40,
        num_selected: int = 3,
        queue_length: int = 20,
        entropy_coef: float = 0.01,
        learning_rate: float = 0.01,
        max_grad_norm: float = 1.0,
        **options: Any,
    ) -> None:
        check_counts(update_every=update_every, num_selected=num_selected)
        check_counts(2, queue_length=queue_length)  # correlations of one row are none
        check_finite(entropy_coef=entropy_coef)
        check_positive(learning_rate=learning_rate)
        if not max_grad_norm > 0:  # inf is no limit
            raise ValueError(f"max_grad_norm must be positive, not {max_grad_norm}")
        super().__init__(schedule, loss_weights, **options)
        T = self.num_train_timesteps
        self.update_every, self.num_selected = update_every, min(num_selected, T)
        self.entropy_coef, self.learning_rate, self.max_grad_norm = entropy_coef, learning_rate, max_grad_norm
        self._vlb_scale = self._table(schedule.own(vlb_scale(schedule.whole)))
        self.channels: Any = None  # these three: of phi, which is flat, from the first images on
        self.policy: Any = None
        self.moments: Any = None
        self.policy_steps = self.num_falls = self.updates = 0
        self.falls = torch.zeros(queue_length, T, device=self.device)
        self.selected = torch.arange(self.num_selected, device=self.device)
        self._drawn: Any = None  # these two: of the update that is being measured
        self._before: Any = None

    def initial_density(self, schedule: NoiseSchedule) -> torch.Tensor:
        start = torch.full((1,), 0.5, dtype=torch.float64)
        return beta_table(F.softplus(start), F.softplus(start), schedule.num_train_timesteps)[0]

    @torch.no_grad()
    def sample(
        self, batch_size: int, generator: torch.Generator | None = None, images: torch.Tensor | None = None
    ) -> TimestepBatch:
        if images is None:
            self._drawn = None
            return super().sample(batch_size, generator)
        if len(images) != batch_size:
            raise ValueError(f"{len(images)} images for {batch_size} timesteps")
        if self.policy is None:
            self.channels = images.shape[1]
            self.policy = initial_policy(self.channels, self.seed).to(self.device)
            self.moments = torch.zeros(2, len(self.policy), device=self.device)
        if generator is None:
            generator = self._stream(self.num_draws, 16 + rank_and_world_size()[0])
        self.num_draws += 1
        concentrations = torch.stack(beta_parameters(self.policy, self.channels, images)).double()
        gammas = torch._standard_gamma(concentrations, generator=generator)  # Beta.sample takes no generator
        self._drawn = (gammas[0] / gammas.sum(0)).nan_to_num(0.5).clamp(1e-6, 1 - 1e-6).float()
        timesteps = (self._drawn * (self.num_train_timesteps - 1)).round().long()
        return self._batch_of(timesteps)

    @torch.no_grad()
    def before_update(self, images: torch.Tensor, denoising_loss: DenoisingLoss) -> None:
        if self._drawn is None or self.updates % self.update_every:
            return
        one = images[torch.randint(len(images), (1,), generator=self._stream(self.updates, 13), device=self.device)]
        if rank_and_world_size()[1] > 1:
            dist.broadcast(one, 0)
        self._before = images, one, *self._vlb_terms(images, one, denoising_loss)

    @torch.no_grad()
    def after_update(self, denoising_loss: DenoisingLoss) -> None:
        if self._before is not None:
            images, one, *before = self._before
            after = self._vlb_terms(images, one, denoising_loss)
            falls = [(b - a).nan_to_num(0.0, 0.0, 0.0) for b, a in zip(before, after, strict=True)]
            at_selected, everywhere = falls
            self._renew_selection(everywhere)
            self._reinforce(images, at_selected.sum(1))
            self._before = None
        self.updates += 1

    def _vlb_terms(self, images, one, denoising_loss):
        """L_t in bits per dimension, of the model as it is: [B, |S|] of `images` at S, and [T] of `one` image at every
        timestep. Called twice in an update, it uses the same noise twice."""
        rank, world_size = rank_and_world_size()
        T = self.num_train_timesteps

        def terms(images, timesteps, generator):
            noise = torch.randn(images.shape, generator=generator, device=self.device)
            return (
                self._vlb_scale[timesteps]
                * denoising_loss(images, noise, self._schedule.to_scheduler(timesteps)).float()
            )

        generator = self._stream(self.updates, 16 + world_size + rank)
        at_selected = torch.stack([terms(images, t.expand(len(images)), generator) for t in self.selected], 1)
        everywhere = torch.zeros(T, device=self.device)
        batches = math.ceil(T / (world_size * len(images)))  # as many on each process, and all of the batch's size
        own = torch.arange(batches * len(images), device=self.device) * world_size + rank
        for timesteps in own.split(len(images)):
            inside = timesteps.clamp(max=T - 1)
            values = terms(one.expand(len(timesteps), *one.shape[1:]), inside, generator)
            everywhere.index_add_(0, inside, torch.where(timesteps < T, values, 0.0))
        if world_size > 1:
            dist.all_reduce(everywhere)
        return at_selected, everywhere

    def _renew_selection(self, falls):
        self.falls[self.num_falls % len(self.falls)] = falls
        self.num_falls += 1
        if self.num_falls > 1:
            self.selected = best_predictors(self.falls[: self.num_falls], self.num_selected)

    def _reinforce(self, images, falls):
        """One step of phi on the rewards of the last draws, and the mean policy as `probabilities`."""
        policy = self.policy.requires_grad_()
        with torch.enable_grad():
            alpha, beta = beta_parameters(policy, self.channels, images)
            pi = Beta(alpha, beta, validate_args=False)
            reward = falls + self.entropy_coef * pi.entropy()
            loss = -(pi.log_prob(self._drawn) * reward).mean()
        (gradient,) = torch.autograd.grad(loss, policy)
        self.policy = policy.detach()
        gradient = self._mean_of_processes(gradient.nan_to_num(0.0, 0.0, 0.0))
        gradient *= (self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        self.policy_steps += 1
        adam_step(self.policy, gradient, self.moments, self.policy_steps, self.learning_rate)
        density = beta_table(alpha.detach().double(), beta.detach().double(), self.num_train_timesteps).mean(0)
        self._set_density(self._mean_of_processes(density))

    def _mean_of_processes(self, tensor):
        world_size = rank_and_world_size()[1]
        if world_size > 1:
            dist.all_reduce(tensor)
        return tensor / world_size

    def _stream(self, counter, stream):
        return self._generator.manual_seed(fold_seed(self.seed, counter, stream))


def vlb_scale(schedule: NoiseSchedule) -> torch.Tensor:
    """[T] beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) / log 2 with sigma_t^2 = beta_t, and at t = 0 the posterior's
    variance at t = 1 (DDPM's "fixed large"); 0 where alpha_t is 0. Times the mean squared epsilon-error, it is the only
    part of KL(q(x_t-1 | x_t, x_0) ‖ p(x_t-1 | x_t)), in bits per dimension, that depends on the model."""
    abar = schedule.alphas_cumprod
    previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    alpha = abar / previous
    beta = 1 - alpha
    variance = beta.clone()
    variance[0] = beta[1] * (1 - previous[1]) / (1 - abar[1])
    scale = beta**2 / (2 * variance * alpha * (1 - abar)) / math.log(2)
    return torch.where(alpha > 0, scale, 0.0)


def best_predictors(rows: torch.Tensor, k: int) -> torch.Tensor:
    """[k] the columns of [N, T] `rows` that correlate best with the rows' sums, in order; the highest of equals, and
    columns that never change last."""
    rows = rows.double()
    rows = rows - rows.mean(0)
    sums = rows.sum(1)
    squared_correlation = (sums @ rows).square() / (rows.square().sum(0) * sums.square().sum())
    return squared_correlation.nan_to_num(0.0).argsort(stable=True)[-k:].sort().values


def parameter_shapes(channels: int) -> list[tuple[int, ...]]:
    """Of the policy network: weight and bias of each layer, for images of that many channels."""
    convolutions = [(o, i, 3, 3) for i, o in pairwise((channels, *CHANNELS))]
    linears = [(o, i) for i, o in pairwise((CHANNELS[-1] * 4 * 4, *HIDDEN, 2))]
    return [shape for weight in convolutions + linears for shape in (weight, weight[:1])]


def initial_policy(channels: int, seed: int) -> torch.Tensor:
    """[P] phi: as torch initialises its layers, but for the last: 0, and a bias of 0.5."""
    generator = torch.Generator().manual_seed(seed)
    *hidden, last_weight, last_bias = parameter_shapes(channels)
    parts = []
    for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
        bound = math.prod(weight[1:]) ** -0.5
        parts += [(2 * torch.rand(shape, generator=generator) - 1) * bound for shape in (weight, bias)]
    parts += [torch.zeros(last_weight), torch.full(last_bias, 0.5)]
    return torch.cat([part.flatten() for part in parts])


def beta_parameters(policy: torch.Tensor, channels: int, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """alpha and beta [B] of each image [B, C, H, W]."""
    shapes = parameter_shapes(channels)
    parts = policy.split([math.prod(shape) for shape in shapes])
    layers = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    layers = list(zip(layers[::2], layers[1::2], strict=True))
    x = images.float()
    for weight, bias in layers[: len(CHANNELS)]:
        x = F.max_pool2d(F.conv2d(x, weight, bias, padding=1).relu(), 2, ceil_mode=True)
    x = F.adaptive_avg_pool2d(x, 4).flatten(1)
    for weight, bias in layers[len(CHANNELS) : -1]:
        x = F.linear(x, weight, bias).relu()
    return (F.softplus(F.linear(x, *layers[-1])) + 1e-5).unbind(1)


def beta_table(alpha: torch.Tensor, beta: torch.Tensor, T: int, num_points: int = 4097) -> torch.Tensor:
    """[B, T] the probability that round((T - 1) x) = t, x ~ Beta(alpha, beta) [B], float64; at least 1e-9 / T.

    The distribution function is integrated over z = logit(x), where the density, x^alpha (1 - x)^beta, has no poles,
    and interpolated by cubics.
    """
    z = torch.linspace(-40, 40, num_points, dtype=torch.float64, device=alpha.device)
    log_density = alpha[:, None] * F.logsigmoid(z) + beta[:, None] * F.logsigmoid(-z)
    density = (log_density - log_density.amax(1, keepdim=True)).exp()
    density = density / density.sum(1, keepdim=True)  # per step of the grid
    cdf = F.pad((density[:, 1:] + density[:, :-1]).cumsum(1) / 2, (1, 0))
    cdf = cdf - torch.gradient(density, dim=1)[0] / 12  # what the trapezoids leave out, Euler-Maclaurin
    edges = ((torch.arange(T - 1, dtype=torch.float64, device=alpha.device) + 0.5) / (T - 1)).logit()
    position = (edges + 40) / 80 * (num_points - 1)
    below, s = position.long(), position.frac()
    slope, next_slope = density[:, below], density[:, below + 1]
    step = cdf[:, below + 1] - cdf[:, below]
    at_edges = cdf[:, below] + s * (
        slope + s * (3 * step - 2 * slope - next_slope + s * (slope + next_slope - 2 * step))
    )
    mass = F.pad(at_edges, (1, 0)).diff(dim=1, append=torch.ones_like(cdf[:, :1]))
    mass = mass.clamp_min(1e-9 / T)
    return mass / mass.sum(1, keepdim=True)
