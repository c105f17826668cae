"""The pictures of docs/method.md, by the code that trains: no network is trained for them, and none is needed.

    python benchmarks/method_pictures.py

The digits' tables are computed; those of CIFAR-10, and what single examples' gradients are like, are read from
benchmarks/results/, where the command that measured them stands beside them. Takes seconds.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images import open_images
from samplers import NoiseSchedule, Spectrum, checked_weights, make_timestep_sampler, weightings
from samplers.spectrum import relative_gains

matplotlib.use("agg")

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
SHOWN = (20, 100, 200, 400, 700)  # timesteps of the filter's picture


@dataclass
class PictureOptions:
    """Options of benchmarks/method_pictures.py."""

    output_dir: str = field(default=str(REPOSITORY / "docs"), metadata={"help": "Where the four .png files go."})


def main(options):
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    images = open_images("digits").sample()
    spectrum = Spectrum.of(images)
    draw = {
        "method_filter": lambda: draw_filter(schedule, spectrum),
        "method_weighting": lambda: draw_weighting(schedule, spectrum),
        "method_density": lambda: draw_density(schedule, spectrum),
        "method_pairs": lambda: draw_pairs(images),
    }
    for name, function in draw.items():
        figure = function()
        figure.savefig(Path(options.output_dir) / f"{name}.png", dpi=90)
        plt.close(figure)


def draw_filter(schedule, spectrum):
    """The digits' variances s_i^2 by spatial frequency, against the noise's; and the gains K_i that follow."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    rings, frequencies = rings_of(spectrum.variances)
    left.plot(frequencies, by_ring(spectrum.variances, rings), "o-", color="black")
    colors = plt.get_cmap("viridis")
    for i, t in enumerate(SHOWN):
        abar, color = schedule.alphas_cumprod[t], colors(i / (len(SHOWN) - 1))
        gains = abar * relative_gains(spectrum.variances, abar, 1 - abar)
        left.axhline(float((1 - abar) / abar), color=color, linestyle="--", linewidth=1)
        right.plot(frequencies, by_ring(gains, rings), "o-", color=color, label=f"t = {t}")
    left.set(yscale="log", title=r"variance $s_i^2$ of the digits; dashed: of the noise, $\sigma_t^2$")
    right.set(ylim=(0, 1.02), title=r"gain $K_i = s_i^2 / (s_i^2 + \sigma_t^2)$ of the Wiener filter")
    figure.legend(fontsize="small", loc="outside right center")
    for axis in (left, right):
        axis.set_xlabel("spatial frequency, cycles an image")
        axis.grid(alpha=0.3)
    return figure


def rings_of(variances):
    """[H, W] the rounded length of each frequency of torch.fft.fft2, in cycles an image; and those lengths."""
    H, W = variances.shape[1:]
    lengths = torch.hypot(torch.fft.fftfreq(H, 1 / H)[:, None], torch.fft.fftfreq(W, 1 / W)[None])
    rings = lengths.round().long()
    return rings, torch.arange(int(rings.max()) + 1)


def by_ring(values, rings):
    """The mean of [C, H, W] in each ring of frequencies."""
    return [float(values[:, rings == ring].mean()) for ring in range(int(rings.max()) + 1)]


def draw_weighting(schedule, spectrum):
    """`scaled_logit_normal` for data of two deviations; and of the digits, the objectives that sampling gives. Means
    are 1, or nearly."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for deviation, label in ((0.5, "0.5: pixels"), (1.0, "1: latents")):
        weights = weightings.scaled_logit_normal(schedule, torch.tensor([deviation**2]))
        left.plot(weights, label=rf"$\sigma_{{data}}$ = {label}")
    left.set_title("loss weighting `scaled_logit_normal`")
    for name, style in (("spectral", "--"), ("spectral_ode", ":"), ("spectral_both", "-")):
        right.plot(checked_weights(name, schedule, spectrum), style, label=f"`{name}`", color="tab:blue")
    right.set_title("on the digits, by the way of sampling")
    for axis in (left, right):
        axis.axhline(1, color="grey", linestyle="--", linewidth=1, label="DDPM")
        axis.set(xlabel="timestep $t$", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def draw_density(schedule, spectrum):
    """The density of least gradient variance on the digits, as measured, and what the free proxy makes of it."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    probe = read("gradient_probe_digits.json")
    t = torch.tensor(probe["timesteps"])
    c = checked_weights("scaled_logit_normal", schedule, spectrum)[t]
    measured = c * torch.tensor(probe["metrics"]["adam"]["second_moment"]).sqrt()
    proxy = c * torch.tensor(probe["loss"]).sqrt()
    axis.plot(t, measured / measured.mean(), "o-", color="black", label=r"least variance: $c_t\sqrt{G_t}$, measured")
    axis.plot(t, proxy / proxy.mean(), "s--", color="tab:blue", label=r"from the losses alone: $c_t\sqrt{E[\ell_t]}$")
    axis.axhline(1, color="grey", linestyle="--", linewidth=1, label="uniform")
    axis.set(xlabel="timestep $t$", title="density $T p_t$ on the digits", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def draw_pairs(images):
    """A batch's timesteps and the signs of its noise; and how alike single examples' gradients are."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    sampler = make_timestep_sampler(DDPMScheduler(), "adaptive", images=images)
    timesteps = sampler.sample(16).timesteps.view(2, 8)
    for i, (first, second) in enumerate(timesteps.T.tolist()):
        left.plot([first, second], [i, i], color="grey", linewidth=1, zorder=1)
        left.scatter(first, i, marker="+", s=60, color="tab:blue", label=r"noise $+\epsilon_i$" if i == 0 else None)
        left.scatter(second, i, marker="_", s=60, color="tab:red", label=r"noise $-\epsilon_i$" if i == 0 else None)
    left.set(xlabel="timestep $t$", ylabel="pair $i$", title="a batch of 16, at first: examples $i$ and $i + 8$")
    left.legend(fontsize="small", loc="upper left")
    for name, data, marker in (("cifar10_16x16", "CIFAR-10 16×16", "o"), ("digits", "digits", "s")):
        probe = read(f"gradient_probe_{name}.json")
        for partner, color in (("unrelated", "grey"), ("-eps", "tab:red")):
            noise = "opposite noise" if partner == "-eps" else "unrelated noise"
            cosines = probe["metrics"]["adam"][f"cosine of {partner}"]
            right.plot(probe["timesteps"], cosines, marker=marker, color=color, label=f"{noise}, {data}", markersize=4)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="timestep $t$", title="cosine of the gradients of two different images")
    right.legend(fontsize="small", loc="upper left")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def read(name):
    return json.loads((RESULTS / name).read_text())


if __name__ == "__main__":
    main(HfArgumentParser(PictureOptions).parse_args_into_dataclasses()[0])
