"""Measurements that take turns, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from transformers.hf_argparser import HfArg


@dataclass
class TimingOptions:
    """What is measured, and how often."""

    _argument_group_name = "Measurement"

    output_json: str | None = HfArg(default=None, help="New file of the measurements.")
    repeats: int = HfArg(default=7, help="Timed rounds, after one untimed.")
    steps_per_repeat: int = HfArg(default=10, help="Training steps a round.")


def interleaved(functions: dict[Hashable, Callable[[], object]], repeats: int) -> dict[Hashable, list]:
    """What each call returned; one round that is left out, then `repeats` rounds that take turns in who goes first."""
    results = {name: [] for name in functions}
    for repeat in range(-1, repeats):
        for name in sorted(functions, reverse=repeat % 2 == 1):
            result = functions[name]()
            if repeat >= 0:
                results[name].append(result)
    return results


def time_interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `interleaved`."""
    return interleaved({name: partial(seconds_of, function) for name, function in functions.items()}, repeats)


def seconds_of(function: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, where there is one: launches return before their work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
