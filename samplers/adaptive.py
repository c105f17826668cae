"""Ours: the density of least gradient variance for a given objective, learned from the run's own losses."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .base import TimestepSampler, rank_and_world_size

EXPLODED = 1e8  # a loss beyond this says nothing about its timestep; float32 sums stay finite


class AdaptiveSampler(TimestepSampler):
    """p_t ∝ c_t * sqrt(E[l_t]), w_t = c_t / (T * p_t): variance-optimal importance sampling.

    Training minimises J = sum_t c_t E[l_t], where c_t is the loss weighting (`bell` by default). Any density with
    w_t = c_t / (T p_t) has the same expected gradient; its variance is sum_t c_t^2 G_t / p_t - |grad J|^2, with G_t the
    second moment of one example's gradient at t, and is least at p_t ∝ c_t sqrt(G_t). The gradient at the network's
    output is that of a squared error, of squared norm ∝ l_t, so sqrt(E[l_t]) stands in for sqrt(G_t) (Katharopoulos &
    Fleuret 2018, arXiv 1803.00942, bound it by the last layer's) - the mean loss, not IDDPM's mean squared loss.

    E[l_t] is a running mean: sums and counts that decay with the number of draws, both smoothed over neighbouring
    timesteps by a Gaussian before they are divided. p_t is mixed with a little uniform, so that no timestep is
    starved and no weight explodes; until `warmup` draws per timestep were seen, p_t is uniform. Statistics stay on
    the device and are summed over processes each time the density is renewed.

    In between, each process holds the losses that it alone has seen. States saved one a process resume exactly; one
    saved by the first for all, as `accelerator.register_for_checkpointing` does, leaves out what the others have seen
    since the last renewal.

    Args:
        uniform_fraction: of the draws that are uniform, in (0, 1].
        warmup: draws per timestep before the density adapts.
        horizon: draws per timestep over which the running mean forgets (a time constant).
        smoothing: standard deviation of the Gaussian over timesteps, as a fraction of T.
        refresh_every: updates between two renewals of the density.
    """

    corrects_for_density = True
    state_names = ("sums", "pending", "draws_seen", "updates", "rank")

    def __init__(
        self,
        schedule,
        loss_weights=None,
        *,
        uniform_fraction=0.1,
        warmup=5.0,
        horizon=20.0,
        smoothing=0.005,
        refresh_every=20,
        **options,
    ):
        if not 0 < uniform_fraction <= 1:
            raise ValueError(f"uniform_fraction must be in (0, 1], not {uniform_fraction}")
        super().__init__(schedule, loss_weights, **options)
        T = self.num_train_timesteps
        self.uniform_fraction = uniform_fraction
        self.warmup_draws, self.horizon_draws = warmup * T, horizon * T
        self.refresh_every = refresh_every
        self._kernel = self._table(gaussian_kernel(smoothing * T))
        self.sums = torch.zeros(2, T, device=self.device)  # decayed sum of losses; decayed count of draws
        self.pending = torch.zeros(2, T, device=self.device)  # the same since the last renewal, of this process alone
        self.draws_seen = torch.zeros((), device=self.device)
        self.updates = 0
        self.rank = rank_and_world_size()[0]

    @torch.no_grad()
    def update(self, timesteps, losses):
        """Add a batch of losses [B] at timesteps [B]; those that are not finite, or exploded, are left out."""
        losses = losses.detach().float()
        usable = losses.abs() < EXPLODED
        self.pending[0].index_add_(0, timesteps, torch.where(usable, losses, 0.0))
        self.pending[1].index_add_(0, timesteps, usable.float())
        self.updates += 1
        if self.updates % self.refresh_every == 0:
            self._renew_density()

    def expected_loss(self):
        """[T] the current estimate of E[l_t]."""
        radius = len(self._kernel) // 2
        # Not a convolution: cuDNN may choose another algorithm on another process, and tables must be alike on all.
        windows = F.pad(self.sums, (radius, radius)).unfold(-1, len(self._kernel), 1)
        losses, draws = (windows * self._kernel).sum(-1)
        overall = self.sums[0].sum() / self.sums[1].sum().clamp_min(1.0)
        return (losses + overall) / (draws + 1)  # as if the overall mean had been seen once: defined before any draw

    def load_state_dict(self, state):
        rank = self.rank
        super().load_state_dict(state)
        if self.rank != rank:  # the losses since the last renewal are another process's, which counts them itself
            self.pending.zero_()
            self.rank = rank

    def _renew_density(self):
        if rank_and_world_size()[1] > 1:
            dist.all_reduce(self.pending)
        draws = self.pending[1].sum()
        self.sums.mul_(torch.exp(-draws / self.horizon_draws)).add_(self.pending)
        self.pending.zero_()
        self.draws_seen += draws
        optimal = self.loss_weights * self.expected_loss().sqrt()
        ready = (self.draws_seen >= self.warmup_draws) & (optimal.sum() > 0)
        optimal = torch.where(ready, optimal / optimal.sum(), 1 / self.num_train_timesteps)
        f = self.uniform_fraction
        self._set_density((1 - f) * optimal + f / self.num_train_timesteps)


def gaussian_kernel(std):
    """[2r + 1] a Gaussian of standard deviation `std` timesteps, cut at r = 3 std."""
    radius = math.ceil(3 * std)
    t = torch.arange(-radius, radius + 1)
    return torch.exp(-0.5 * (t / max(std, 1e-6)) ** 2)
