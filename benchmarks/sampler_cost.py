"""What the calls of a timestep sampler cost at a small batch, in microseconds and as a share of a training step.

    python benchmarks/sampler_cost.py --output_json benchmarks/results/sampler_cost.json

A step is one of the toy of Stable Diffusion 3's transformer in tests/integrations/toys.py, forward, backward and AdamW,
so small that a sampler weighs far more in it than in any network in use. Of each call, "beyond" is what it takes beyond
its tensor operations: its time less that of the same operations in the same order, called one after the other. All take
turns, in rounds of so many calls that the renewals of a density count as often as in training. Times are the process's
own, on one core: another process that takes it does not count.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from timing import interleaved, summary
from torch.overrides import TorchFunctionMode
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "integrations"))
from new_outputs import check_new_record
from toys import WIDTH, latents, sd3, text

from recipes import one_line_errors
from samplers import make_timestep_sampler
from training.machine import code_commit, device_name, library_versions, this_command
from training.saving import write_json

CALLS, STEPS = 200, 20  # a round; of calls, a multiple of `refresh_every`


@dataclass
class SamplerCostOptions:
    """Options of benchmarks/sampler_cost.py."""

    output_json: str = field(metadata={"help": "New file of the measurements."})
    methods: list[str] = field(default_factory=lambda: ["adaptive", "ddpm"], metadata={"help": "Of the samplers."})
    batch_size: int = field(default=1, metadata={"help": "B."})
    repeats: int = field(default=15, metadata={"help": f"Rounds of {CALLS} calls, after one that is not counted."})


def main(options: SamplerCostOptions) -> None:
    with one_line_errors(ValueError):
        check_new_record(options.output_json)
    calls = {f"{method}.{name}": call for method in options.methods for name, call in calls_of(method, options).items()}
    replays = {f"{name}, operations": replay_of(call) for name, call in calls.items()}
    rounds = {name: partial(microseconds_of, call, CALLS) for name, call in {**calls, **replays}.items()}
    rounds["step"] = partial(microseconds_of, training_step(options.batch_size), STEPS)
    torch.set_num_threads(1)
    times = interleaved(rounds, options.repeats)
    for name in calls:
        pairs = zip(times[name], times.pop(f"{name}, operations"), strict=True)
        times[f"{name}, beyond"] = [call - operations for call, operations in pairs]
    for method in options.methods:
        of_method = (times[name] for name in calls if name.startswith(f"{method}."))
        times[method] = [sum(values) for values in zip(*of_method, strict=True)]
    step = summary(times["step"])["median"]
    results = {
        "microseconds": {name: summary(values) for name, values in times.items()},
        "share_of_step": {method: summary(times[method])["median"] / step for method in options.methods},
        "batch_size": options.batch_size,
        "device": device_name(torch.device("cpu")),
        "versions": library_versions(),
        "commit": code_commit(),
        "command": this_command(),
    }
    for name, row in results["microseconds"].items():
        print(f"{name:30} {row['median']:9.1f} us ({row['min']:.1f} to {row['max']:.1f})")
    print(*(f"{method}: {share:.2%} of a step" for method, share in results["share_of_step"].items()), sep="\n")
    write_json(results, Path(options.output_json))


def calls_of(method: str, options: SamplerCostOptions) -> dict[str, Callable[[], Any]]:
    """{name: call} of the four that a step makes, as of a flow."""
    sampler = make_timestep_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), method, images=latents(64))
    images = latents(options.batch_size)
    timesteps, _ = sampler.sample(options.batch_size)
    errors, losses = torch.randn_like(images), torch.ones(options.batch_size)
    return {
        "sample": lambda: sampler.sample(options.batch_size),
        "noise": lambda: sampler.noise(images),
        "losses": lambda: sampler.losses(errors, timesteps),
        "update": lambda: sampler.update(timesteps, losses),
    }


def training_step(batch_size: int) -> Callable[[], None]:
    """A step of SD3's toy."""
    network, images = sd3(), latents(batch_size)
    optimizer = torch.optim.AdamW(network.parameters())
    prompt, pooled, timesteps = text(batch_size), torch.zeros(batch_size, WIDTH), torch.full((batch_size,), 500.0)

    def step() -> None:
        prediction = network(images, prompt, pooled, timesteps).sample
        F.mse_loss(prediction, images).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Recorder(TorchFunctionMode):
    """Notes the tensor operations that run within it, as Python calls them."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.operations.append(partial(function, *args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def replay_of(call: Callable[[], Any]) -> Callable[[], None]:
    """The tensor operations of `CALLS` calls, at each call those of the next: without what is around them."""
    parts = []
    for _ in range(CALLS):
        with Recorder() as recorder:
            call()
        parts.append(recorder.operations)
    turns = itertools.cycle(parts)

    @torch.no_grad()
    def replay() -> None:
        for operation in next(turns):
            operation()

    return replay


def microseconds_of(function: Callable[[], Any], calls: int) -> float:
    """Of a call, the mean of so many."""
    begun = time.process_time()
    for _ in range(calls):
        function()
    return 1e6 * (time.process_time() - begun) / calls


if __name__ == "__main__":
    main(HfArgumentParser(SamplerCostOptions).parse_args_into_dataclasses()[0])
