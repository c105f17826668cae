"""When to stop: a budget spent, or a signal, agreed on by all processes."""

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import Accelerator

from .clock import PhaseClock

if TYPE_CHECKING:
    from .state import TrainingState

AGREE_EVERY = 10  # steps between two agreements of several processes: a collective each


class Abandoned(Exception):
    """Raised by a signal in what is not worth waiting for."""


class StopCondition:
    """Tells when the run should end, and why.

    Ctrl-C and SIGTERM ask for an orderly end after the current step; a second Ctrl-C interrupts at once.

    Args:
        accelerator: of the run.
        max_steps: steps, or None.
        max_seconds: of training proper, or None.
        clock: the run's `PhaseClock`.
    """

    def __init__(self, accelerator: Accelerator, max_steps: int | None, max_seconds: float | None, clock: PhaseClock):
        self.accelerator, self.clock = accelerator, clock
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self.signal = None
        self.is_in_abandonable_part = False
        # A launcher that is sent SIGTERM may die without passing it on: its end is then the signal.
        self.launcher = os.getppid() if is_launcher(os.getppid()) else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, _frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self.accelerator.is_main_process:
            os.write(
                2, f"\n{self.signal.name}: saving after this step and stopping; Ctrl-C twice ends at once\n".encode()
            )
        if self.is_in_abandonable_part:
            self.is_in_abandonable_part = False  # only the first signal: what comes next is cleaning up
            raise Abandoned

    def unless_signalled(self, function: Callable[[], Any]) -> Any:
        """What `function` returns; None if a signal came before its end, which ends it at once. For what nothing of the
        run depends on."""
        try:
            self.is_in_abandonable_part = True
            return None if self.signal else function()
        except Abandoned:
            return None
        finally:
            self.is_in_abandonable_part = False

    def is_signalled(self) -> bool:
        """Whether any process was sent a signal. A collective, at whatever step: all processes must call it."""
        return bool(agreed_maximum(self.accelerator, 0, int(bool(self.signal))))

    def reason(self, step: int) -> str | None:
        """Why to stop before step number `step`: "steps", "seconds", "signal", or None to go on."""
        if self.max_steps is not None and step >= self.max_steps:
            return "steps"
        if self.launcher is not None and os.getppid() != self.launcher:
            self.signal = signal.SIGTERM
        out_of_time = self.max_seconds is not None and self.clock.seconds("train") >= self.max_seconds
        return (None, "seconds", "signal")[
            agreed_maximum(self.accelerator, step, max(out_of_time, 2 * bool(self.signal)))
        ]


def is_launcher(pid: int) -> bool:
    """Whether a process is one of `accelerate launch` or torchrun, which start and end their workers."""
    try:
        words = {os.path.basename(word) for word in psutil.Process(pid).cmdline()}
    except psutil.Error:
        return False
    launchers = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run")
    return not words.isdisjoint(launchers)


class Interval:
    """Tells when something is due that comes each so many steps, images or seconds of training.

    Args:
        state: of the run; what was due before it stands where it does is past.
        steps, images, seconds: between two times; None or 0 for never.
    """

    def __init__(
        self,
        state: "TrainingState",
        *,
        steps: int | None = None,
        images: int | None = None,
        seconds: float | None = None,
    ):
        self.state, self.steps, self.images, self.seconds = state, steps, images, seconds
        self.times = self._times()

    def is_due(self) -> bool:
        """Whether it is due after the update just made. With seconds a collective: all processes must call it."""
        state = self.state
        by_steps = bool(self.steps) and state.step % self.steps == 0
        by_images = bool(self.images) and (
            state.images // self.images > (state.images - state.images_per_step) // self.images
        )
        if not self.seconds:
            return by_steps or by_images
        by_seconds = bool(agreed_maximum(state.accelerator, state.step, int(self._times() > self.times)))
        self.times = max(self.times, self._times()) if by_seconds else self.times
        return by_steps or by_images or by_seconds

    def _times(self) -> int:
        return int(self.state.clock.seconds("train") // self.seconds) if self.seconds else 0


def agreed_maximum(accelerator: Accelerator, step: int, value: int) -> int:
    """The largest of all processes' small non-negative integers; of several processes at each tenth step only, 0 in
    between, because it is a collective and waits for the device."""
    if accelerator.num_processes == 1:
        return value
    if step % AGREE_EVERY:
        return 0
    value = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value.item()


class NonFiniteGuard:
    """Skips updates whose gradient is not finite, without asking the device on each step.

    Fused optimisers leave parameters and state alone where `found_inf` is 1. Under fp16 the gradient scaler does the
    skipping, and this only counts.

    Args:
        optimizer: the fused torch optimiser inside accelerate's.
        scaled: a gradient scaler is in use.
        max_in_row: updates skipped in a row at which `check` gives up.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device | str, scaled: bool, max_in_row: int):
        self.optimizer, self.scaled, self.max_in_row = optimizer, scaled, max_in_row
        self.counts = torch.zeros(3, device=device)  # skipped in all; in a row now; most in a row since the last check

    def observe(self, gradient_norm: torch.Tensor) -> None:
        """Call between clipping and the optimiser's step. gradient_norm: 0-d tensor on the device."""
        skipped = (~gradient_norm.isfinite()).float()
        total, in_row, worst = self.counts
        in_row = (in_row + 1) * skipped
        self.counts = torch.stack([total + skipped, in_row, torch.maximum(worst, in_row)])
        if not self.scaled:
            self.optimizer.found_inf = skipped

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The counts, on the CPU."""
        return {"counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the counts."""
        self.counts.copy_(state["counts"])

    def check(self) -> int:
        """Updates skipped so far. Waits for the device.

        Raises:
            FloatingPointError: `max_in_row` updates in a row were skipped.
        """
        total, _, worst = self.counts.tolist()
        if worst >= self.max_in_row:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {int(worst)} steps in a row "
                f"(--max_nonfinite_steps {self.max_in_row}): lower --learning_rate, or use bf16 in place of fp16"
            )
        self.counts[2] = 0
        return int(total)
