"""When to stop: a budget spent, or a signal, agreed on by all processes."""

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from .clock import PhaseClock

AGREE_EVERY = 10  # steps between two agreements of several processes, on signals and on time: a collective each
TICKS = 10_000  # of a budget of time: processes agree on whole numbers


class Abandoned(Exception):
    """Raised by a signal in what is not worth waiting for."""


class Budget:
    """What a run may spend. The first limit that is reached ends it, at the same step in all processes, which must make
    it together.

    Args:
        accelerator: of the run.
        clock: the run's `PhaseClock`, with the seconds of the part before a resume.
        max_steps: updates, or None.
        max_seconds: of training proper, or None.

    Attributes:
        share_of_time: that is spent, in [0, 1], the same in all processes; of several, as of the last tenth step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        clock: PhaseClock,
        max_steps: int | None = None,
        max_seconds: float | None = None,
    ):
        self.accelerator, self.clock = accelerator, clock
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self.share_of_time = 0.0
        self.look_at_clock(0)

    def look_at_clock(self, step: int) -> None:
        """Let the time that has gone by count, as far as all processes agree on it. All must call it at each step."""
        if self.max_seconds is not None:
            ticks = int(TICKS * min(self.clock.seconds("train") / self.max_seconds, 1.0))
            self.share_of_time = max(self.share_of_time, agreed_maximum(self.accelerator, step, ticks) / TICKS)


class StopCondition:
    """Tells when the run should end, and why.

    Ctrl-C and SIGTERM ask for an orderly end after the current step; a second Ctrl-C interrupts at once.

    Args:
        budget: of the run.
    """

    def __init__(self, budget: Budget):
        self.accelerator, self.budget = budget.accelerator, budget
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
        if self.budget.max_steps is not None and step >= self.budget.max_steps:
            return "steps"
        if self.launcher is not None and os.getppid() != self.launcher:
            self.signal = signal.SIGTERM
        self.budget.look_at_clock(step)
        if agreed_maximum(self.accelerator, step, int(bool(self.signal))):
            return "signal"
        return "seconds" if self.budget.share_of_time == 1 else None


def is_launcher(pid: int) -> bool:
    """Whether a process is one of `accelerate launch` or torchrun, which start and end their workers."""
    try:
        words = {os.path.basename(word) for word in psutil.Process(pid).cmdline()}
    except psutil.Error:
        return False
    launchers = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run")
    return not words.isdisjoint(launchers)


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
