"""Images per second of `UnconditionalPipeline.sample` and of the stock `DDPMPipeline`, on the same weights.

    python benchmarks/sampling.py --block_out_channels 32 64 64 --batch_size 16 --output_json sampling.json

Both make one batch of float or uint8 tensors, with no pictures written; their runs are interleaved, after a
warm-up of each, so that a machine that slows down slows both.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pipelines import UnconditionalPipeline


@dataclass
class BenchmarkArguments:
    """Options of benchmarks/sampling.py."""

    pipeline: str | None = field(default=None, metadata={"help": "Folder or Hub id; else a U-Net is built."})
    sample_size: int = field(default=32, metadata={"help": "Side of the built U-Net's images."})
    channels: int = field(default=3, metadata={"help": "1 for grey, 3 for RGB."})
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    batch_size: int = 16
    num_inference_steps: int = 20
    repeats: int = field(default=7, metadata={"help": "Timed runs of each, after one untimed."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu")
    output_json: str | None = None


def main() -> None:
    args = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0]
    stock = DDPMPipeline.from_pretrained(args.pipeline) if args.pipeline else build_pipeline(args)
    ours = UnconditionalPipeline(unet=stock.unet, scheduler=stock.scheduler)
    for pipeline in (stock, ours):
        pipeline.to(args.device).set_progress_bar_config(disable=True)
    steps = args.num_inference_steps
    seconds = time_interleaved(
        {
            "stock": lambda: stock(batch_size=args.batch_size, num_inference_steps=steps, output_type="pt"),
            "ours": lambda: ours.sample(range(args.batch_size), num_inference_steps=steps),
        },
        args.repeats,
    )
    rates = {name: [args.batch_size / s for s in times] for name, times in seconds.items()}
    result = {
        "images_per_second": {name: summary(values) for name, values in rates.items()},
        "ours_over_stock": summary([a / b for a, b in zip(rates["ours"], rates["stock"], strict=True)]),
        "parameters": sum(p.numel() for p in stock.unet.parameters()),
        "arguments": asdict(args),
        "command": " ".join(["python", *sys.argv]),
        "hardware": torch.cuda.get_device_name() if args.device != "cpu" else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    print_table(result)
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(result, indent=2) + "\n")


def build_pipeline(args: BenchmarkArguments) -> DDPMPipeline:
    """A U-Net with random weights and attention in its last block."""
    torch.manual_seed(0)
    plain = len(args.block_out_channels) - 1
    unet = UNet2DModel(
        sample_size=args.sample_size,
        in_channels=args.channels,
        out_channels=args.channels,
        block_out_channels=args.block_out_channels,
        down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * plain,
        norm_num_groups=8,
    )
    return DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler())


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


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_table(result: dict) -> None:
    """One row for each pipeline, and one for the ratio of the runs that stood beside each other."""
    size = f"{result['parameters'] / 1e6:.2f} M parameters"
    print(f"{result['hardware']}, {result['num_threads']} threads, {size}")
    print(f"{'':14}{'median':>10}{'min':>10}{'max':>10}")
    rows = {f"{name}, img/s": row for name, row in result["images_per_second"].items()}
    for name, row in (rows | {"ours / stock": result["ours_over_stock"]}).items():
        print(f"{name:14}" + "".join(f"{row[key]:10.3f}" for key in ("median", "min", "max")))


if __name__ == "__main__":
    main()
