"""What each adaptive method does with a run: its density p_t and weight w_t early, midway and late, as one picture.

    python benchmarks/rivals_behaviour.py --output benchmarks/results/rivals_behaviour

The same small network on the same digits (8x8) for each, five minutes on one thread. It shows behaviour, not quality:
runs are far too short to compare results. Where a method's own schedule is in updates of a long run (CLTS' N,
InfoNoise's warm-up), it is shortened to this one's; all else is as published, and the JSON beside the picture says it.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from samplers import fold_seed, make_timestep_sampler
from training.denoiser import Denoiser
from training.machine import device_name, this_command
from training.metrics import by_bin


@dataclass
class BehaviourArguments:
    """Options of benchmarks/rivals_behaviour.py."""

    steps: int = field(default=1000, metadata={"help": "Updates of each run."})
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    output: str = field(default="rivals_behaviour", metadata={"help": "Of the .png and the .json."})


def variants(steps):
    """label: (method, options of its sampler)."""
    return {
        "clts": ("clts", {"num_updates": steps, "refresh_every": 20}),
        "loss_second_moment": ("loss_second_moment", {}),
        "edm2": ("edm2", {}),
        "adaptive_log_snr": ("adaptive_log_snr", {}),
        "info_noise": ("info_noise", {"warmup": steps // 5}),
        "kim": ("kim", {}),
        "kim, rate 0.001": ("kim", {"learning_rate": 1e-3}),
        "adaptive": ("adaptive", {}),
    }


def main():
    args = HfArgumentParser(BehaviourArguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(1)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    moments = {"early": max(args.steps // 20, 1), "mid": args.steps // 3, "late": args.steps}
    runs = {}
    for label, (method, options) in variants(args.steps).items():
        runs[label] = {"method": method, "options": options, **train(method, options, images, moments, args)}
        print(f"{label:20} loss {runs[label]['loss']:.4f}", flush=True)
    draw(runs, moments, f"{args.output}.png")
    result = {
        "command": this_command(),
        "arguments": asdict(args),
        "hardware": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "moments": moments,
        "runs": {label: run | {"tables": binned(run["tables"])} for label, run in runs.items()},
    }
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")


def train(method, options, images, moments, args):
    """Train a small U-Net by a method: its tables (p_t, w_t) at each moment, and its unweighted loss at the end."""
    torch.manual_seed(args.seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, betas=(0.95, 0.999))
    noise_scheduler = DDPMScheduler()
    denoiser = Denoiser(unet, noise_scheduler)
    sampler = make_timestep_sampler(noise_scheduler, method, images=images, seed=args.seed, **options)
    generator = torch.Generator()

    tables, drawn = {}, []
    for step in range(1, args.steps + 1):
        generator.manual_seed(fold_seed(args.seed, step, stream=1))
        clean = images[torch.randint(len(images), (args.batch_size,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps, weights = sampler.sample(len(clean), images=clean)
        sampler.before_update(clean, denoiser.epsilon_losses)
        errors = denoiser.epsilon_errors(clean, noise, timesteps)
        losses = sampler.losses_of_epsilon(errors, timesteps)
        (weights * losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sampler.update(timesteps, losses.detach())
        sampler.after_update(denoiser.epsilon_losses)
        if step in moments.values():
            tables[step] = sampler.probabilities.clone(), sampler.weights.clone()
        if method == "kim" and (step - 1) % 40 == 0:
            t = timesteps.float()
            drawn.append([step, round(float(t.mean()), 1), round(float(t.std()), 1), sampler.selected.tolist()])
    uniform = torch.randint(1000, (len(images),), generator=generator.manual_seed(0))
    noise = torch.randn(images.shape, generator=generator)
    loss = denoiser.epsilon_losses(images, noise, uniform).mean()
    return {
        "loss": round(float(loss), 5),
        "tables": tables,
        **({"step, mean t, std t, S": drawn} if drawn else {}),
    }


def binned(tables):
    """Densities in units of 1 / T and weights, averaged over 50 bins of timesteps."""
    return {step: {"density": by_bin(p * len(p), 50), "weight": by_bin(w, 50)} for step, (p, w) in tables.items()}


def draw(runs, moments, path):
    """Two rows, density and weight; a column for each run; a line for each moment."""
    figure, axes = plt.subplots(2, len(runs), figsize=(2.6 * len(runs), 5), sharex=True, sharey="row")
    for column, (label, run) in zip(axes.T, runs.items(), strict=True):
        for moment, color in zip(moments, ("0.7", "tab:orange", "tab:blue"), strict=True):
            p, w = run["tables"][moments[moment]]
            column[0].plot((p * len(p)).clamp_min(1e-4), color=color, lw=1, label=f"{moment}: update {moments[moment]}")
            column[1].plot((w / (p * w).sum()).clamp_min(1e-4), color=color, lw=1)
        column[0].set_title(label, fontsize=9)
        column[1].set_xlabel("t")
        for axis in column:
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("p_t · T")
    axes[1, 0].set_ylabel("w_t (mean 1 over draws)")
    axes[0, 0].set_ylim(1e-3, 1e3)
    axes[1, 0].set_ylim(1e-3, 1e3)
    axes[0, 0].legend(fontsize=6, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
