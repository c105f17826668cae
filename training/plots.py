"""Pictures of a run, from the records of its log."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.colors import Normalize

from .log import has_numbers, read_metrics
from .metrics import NUM_BINS

matplotlib.use("agg")


def plot_timestep_density(metrics_path: Path, image_path: Path, num_train_timesteps: int) -> None:
    """Draw p_t, w_t and their product over training, from the records of `metrics.jsonl` that have them."""
    num_bins = min(NUM_BINS, num_train_timesteps)
    records = [record for record in read_metrics(metrics_path) if has_numbers(record, ("density", "weight"), num_bins)]
    if not records:
        return
    panels = [
        ("$T p_t$: how often, against uniform", lambda r: [p * num_train_timesteps for p in r["density"]]),
        ("$w_t$: how much each counts", lambda r: r["weight"]),
        (
            "$T p_t w_t$: the objective",
            lambda r: [num_train_timesteps * p * w for p, w in zip(r["density"], r["weight"], strict=True)],
        ),
    ]
    middles = bin_middles(num_bins, num_train_timesteps)
    colors = plt.get_cmap("viridis")
    scale = Normalize(records[0]["step"], max(records[-1]["step"], records[0]["step"] + 1))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    figure.subplots_adjust(left=0.04, right=0.98, bottom=0.13, top=0.92, wspace=0.16)  # a layout by engine takes longer
    for axis, (title, values) in zip(axes, panels, strict=True):
        for record in records[:: max(1, len(records) // 60)]:
            axis.plot(middles, values(record), color=colors(scale(record["step"])), linewidth=1.2)
        axis.set(title=title, xlabel="timestep $t$", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.colorbar(plt.cm.ScalarMappable(scale, colors), ax=axes, label="training step", pad=0.01, fraction=0.05)
    figure.savefig(image_path, dpi=110)
    plt.close(figure)


def plot_validation_loss(metrics_path: Path, image_path: Path, num_train_timesteps: int) -> None:
    """Draw the loss on the validation images over training, a line a noise level, from the records that have it."""
    num_bins = min(NUM_BINS, num_train_timesteps)
    table = "validation_loss_by_timestep"
    records = [record for record in read_metrics(metrics_path) if has_numbers(record, (table,), num_bins)]
    if not records:
        return
    colors = plt.get_cmap("viridis")
    scale = Normalize(0, num_train_timesteps)
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    steps = [record["step"] for record in records]
    for i, middle in enumerate(bin_middles(num_bins, num_train_timesteps)):
        axis.plot(steps, [r[table][i] for r in records], color=colors(scale(middle)), linewidth=1.2, marker=".")
    axis.set(title=r"$|\epsilon - \epsilon_\theta|^2$ of the averaged weights, by noise level", xlabel="training step")
    axis.set(yscale="log", ylabel="validation loss")
    axis.grid(alpha=0.3, which="both")
    figure.colorbar(plt.cm.ScalarMappable(scale, colors), ax=axis, label="timestep $t$", pad=0.01)
    figure.savefig(image_path, dpi=110)
    plt.close(figure)


def bin_middles(num_bins: int, num_train_timesteps: int) -> list[float]:
    """[num_bins] the timestep in the middle of each bin."""
    return [(i + 0.5) * num_train_timesteps / num_bins for i in range(num_bins)]
