"""Wall-clock time by phase, so that a training budget counts training alone."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class PhaseClock:
    """Adds up seconds in one phase at a time: `setup` from the start of the process until another begins, then
    whichever was entered last.

    Args:
        device: synchronised when a phase ends, so that queued GPU work counts where it belongs.
        seconds: totals to start from (of the part of the run before a resume).
    """

    def __init__(self, device: torch.device | str | None = None, seconds: dict[str, float] | None = None):
        self.totals = dict(seconds or {})
        self._device = torch.device(device or "cpu")
        self._phase, self._since = "setup", time.perf_counter() - process_age()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block for `name`, then go back to the phase before."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def seconds(self, name: str) -> float:
        """Seconds spent in a phase so far, without waiting for the device."""
        running = time.perf_counter() - self._since if name == self._phase else 0.0
        return self.totals.get(name, 0.0) + running

    def report(self) -> dict[str, float]:
        """{phase: seconds} of all phases, rounded to milliseconds."""
        return {name: round(self.seconds(name), 3) for name in {**self.totals, self._phase: 0}}

    def _switch(self, name):
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.totals[self._phase] = self.seconds(self._phase)
        self._phase, self._since = name, time.perf_counter()


def process_age() -> float:
    """Seconds since this process was started, by the kernel's clock since boot, which nobody sets; 0 where there is
    none (outside Linux)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
