"""What samplers that learn from the run's losses have in common: how these are collected, on one process or many."""

from typing import Any

import torch
import torch.distributed as dist

from .base import TimestepSampler
from .checks import check_counts
from .processes import rank_and_world_size
from .schedule import NoiseSchedule

EXPLODED = 1e8  # a loss beyond this says nothing about its timestep; float32 sums stay finite
NOTHING = torch.inf  # in a history, where no loss was seen yet


class LossAwareSampler(TimestepSampler):
    """Adds up the losses at each timestep; every `refresh_every` updates all processes' sums are added, and a subclass
    renews its tables from them in `_renew(pending)`. Losses that are not finite, or exploded, are left out.

    In between, each process holds the losses that it alone has seen. States saved one a process resume exactly; one
    saved by the first for all, as `accelerator.register_for_checkpointing` does, leaves out what the others have seen
    since the last renewal.

    Args:
        refresh_every: updates between two renewals.
    """

    state_names: tuple[str, ...] = ("pending", "updates", "rank")
    counts_of_batches: tuple[str, ...] = (*TimestepSampler.counts_of_batches, "updates")

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        refresh_every: int = 20,
        **options: Any,
    ) -> None:
        check_counts(refresh_every=refresh_every)
        super().__init__(schedule, loss_weights, **options)
        self.refresh_every = refresh_every
        self.updates = 0
        self.rank = rank_and_world_size()[0]
        self.pending = self._nothing()

    @property
    def network_updates(self) -> int:
        """Updates of the network whose losses have all been seen."""
        return self.updates // self.gradient_accumulation_steps

    @torch.no_grad()
    def _learn(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        losses = losses.detach().float()
        self._collect(timesteps, losses, losses.abs() < EXPLODED)
        self.updates += 1
        if self.updates % self.gradient_accumulation_steps == 0 and self._is_due(self.network_updates):
            pending, self.pending = self._of_all_processes(self.pending), self._nothing()
            self._renew(pending)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rank = self.rank
        super().load_state_dict(state)
        if self.rank != rank:  # the losses since the last renewal are another process's, which counts them itself
            self.pending, self.rank = self._nothing(), rank

    def _is_due(self, update: int) -> bool:
        """Whether to renew the tables after so many updates of the network."""
        return update % self.refresh_every == 0

    def _renew(self, pending: torch.Tensor) -> None:
        """Learn from what all processes have seen since the last time; see `_nothing` for its shape."""
        raise NotImplementedError

    def _nothing(self):
        """[2, T] the sum of losses and their number."""
        return torch.zeros(2, self.num_train_timesteps, device=self.device)

    def _collect(self, timesteps, losses, usable):
        self.pending[0].index_add_(0, timesteps, torch.where(usable, losses, 0.0))
        self.pending[1].index_add_(0, timesteps, usable.float())

    def _of_all_processes(self, pending):
        if rank_and_world_size()[1] > 1:
            dist.all_reduce(pending)
        return pending


class LossHistorySampler(LossAwareSampler):
    """Keeps the last `history_length` losses of each timestep, or of each bin of timesteps, in `history`.

    Between two renewals every process keeps those that it has seen; then the processes' are put one behind the other.

    Args:
        bin_of_timestep: [T] int64, 0 .. K-1; by default each timestep is a bin of its own.
        history_length: H.
    """

    state_names: tuple[str, ...] = (*LossAwareSampler.state_names, "history")

    def __init__(
        self,
        schedule: NoiseSchedule,
        loss_weights: torch.Tensor | None = None,
        *,
        history_length: int,
        bin_of_timestep: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        T = schedule.num_train_timesteps
        bin_of_timestep = torch.arange(T) if bin_of_timestep is None else bin_of_timestep
        self._history_shape = int(bin_of_timestep.max()) + 1, history_length
        super().__init__(schedule, loss_weights, **options)
        self._bin_of_timestep = bin_of_timestep.to(self.device)
        self.history = self._nothing()

    def _nothing(self):
        """[K, H] oldest first; NOTHING before the first."""
        return torch.full(self._history_shape, NOTHING, device=self.device)

    def _collect(self, timesteps, losses, usable):
        self.pending = push(self.pending, self._bin_of_timestep[timesteps], losses, usable)

    def _of_all_processes(self, pending):
        parts = [pending]
        world_size = rank_and_world_size()[1]
        if world_size > 1:
            parts = [torch.empty_like(pending) for _ in range(world_size)]
            dist.all_gather(parts, pending)
        self.history = latest(torch.cat([self.history, *parts], 1), self._history_shape[1])
        return pending


def push(history: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """[K, H] `history` after the usable ones of `values` [B], in their order, were appended to `rows` [B]; of each row
    the oldest are shifted out. No order of writing is left open, and nothing waits for the device."""
    K, H = history.shape
    rows, order = torch.where(usable, rows, K).sort(stable=True)
    counts = torch.zeros(K + 1, dtype=torch.int64, device=history.device).index_add_(0, rows, torch.ones_like(rows))
    position = torch.arange(len(rows), device=history.device) - (counts.cumsum(0) - counts)[rows]  # within its row
    column = H - counts[rows] + position
    shift = torch.arange(H, device=history.device) + counts[:K, None]
    padded = torch.cat([history, torch.full_like(history, NOTHING)], 1)
    shifted = padded.gather(1, shift.clamp(max=2 * H - 1)).flatten()
    target = torch.where((rows < K) & (column >= 0), rows * H + column, K * H)  # the last: for those left out
    return torch.cat([shifted, shifted[:1]]).scatter_(0, target, values[order])[:-1].view(K, H)


def latest(history: torch.Tensor, length: int) -> torch.Tensor:
    """[K, length] the last losses of each row [K, H]; NOTHING in front where there are fewer."""
    seen_last = (history != NOTHING).to(torch.int8).argsort(dim=1, stable=True)
    return history.gather(1, seen_last)[:, -length:]
