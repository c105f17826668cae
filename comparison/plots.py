"""Scores against time, and densities, of several methods."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from comparison.summary import Summary

matplotlib.use("agg")

COLOURS = plt.get_cmap("tab20").colors  # one for each method


def plot_scores(score: str, methods: dict[str, Summary], path: Path) -> None:
    """Score against training time, a line a method, with the spread over seeds."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.set_prop_cycle(color=COLOURS)
    for method, summary in methods.items():
        errors = [deviation or 0 for deviation in summary["spreads"]]
        axis.errorbar(summary["times"], summary["means"], errors, marker="o", capsize=3, label=method, **style(method))
    axis.set(xlabel="seconds of training", ylabel=score.upper(), xscale="log", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def style(method: str) -> dict[str, Any]:
    """Our own method stands out."""
    return {"color": "black", "linewidth": 2.5, "zorder": 3} if method == "adaptive" else {}


def plot_densities(methods: dict[str, Summary], path: Path) -> None:
    """p_t and the objective p_t * w_t of each method, early and late in its first run."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for axis in axes.flat:
        axis.set_prop_cycle(color=COLOURS)
    for method, summary in methods.items():
        for column, when in enumerate(("early", "late")):
            if summary["runs"]:
                density, weight = (summary["runs"][0][name][when] for name in ("density", "weight"))
                objective = [p * w for p, w in zip(density, weight, strict=True)]
                positions = [(i + 0.5) / len(density) for i in range(len(density))]
                for row, table in enumerate((density, objective)):
                    label = method if (row, column) == (0, 0) else None  # once in the legend
                    relative = [value * len(table) / sum(table) for value in table]
                    axes[row, column].plot(positions, relative, label=label, **style(method))
    for column, when in enumerate(("early", "late")):
        axes[0, column].set(title=f"density $p_t$, {when}", ylim=(0, None))
        axes[1, column].set(title=f"objective $p_t w_t$, {when}", xlabel="$t / T$", ylim=(0, 5))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
