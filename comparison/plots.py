"""Scores against time and images, and densities, of several methods."""

import math
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, NullLocator

from comparison.summary import Curve, Summary, stop_text
from samplers import METHODS

matplotlib.use("agg")

COLOURS = plt.get_cmap("tab20").colors
LINES = ["-", "--", ":", "-."]
STYLES = cycler(linestyle=LINES[:3]) * cycler(color=COLOURS)
OURS = cycler(color=["black", "0.45"], linewidth=[2.5, 1.8]) * cycler(linestyle=LINES)
RIVALS = tuple(METHODS.keys() - {"adaptive"})  # adaptive_log_snr is one
SHOWN = 10  # of more entrants, so many of the best are told apart, and these
ALWAYS_SHOWN = ("adaptive", "ddpm")
LABELS = {"seconds": "seconds of training", "images": "images trained on"}


class PlainLogFormatter(LogFormatter):
    """Labels where `LogFormatter` has them, as people write numbers: 0.05, 1.6, 300."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_scores(score: str, entrants: dict[str, Summary], path: Path) -> None:
    """Score against training time, against images, or both; a line an entrant, with the spread over seeds. Of many, the
    best are in colour. With a single stop there are no lines, but a ranking."""
    kinds = list(next(iter(entrants.values()))["curves"])
    if len(kinds) == len(stops_of(entrants, kinds[0])) == 1:
        return plot_ranking(score, entrants, kinds[0], path)
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(2 + 5 * len(kinds), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes.flat, kinds, strict=True):
        for name, (label, style) in looks(entrants).items():
            curve, label = entrants[name]["curves"][kind], label if kind == kinds[0] else None  # once in the legend
            draw_curve(axis, curve, label=label, **style)
        axis.set(xlabel=LABELS[kind])
        if stops := stops_of(entrants, kind):  # else all runs failed
            scale_axes(axis, stops)
    axes[0, 0].set(ylabel=score.upper())
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curve(axis: Axes, curve: Curve, **style: Any) -> None:
    """Scores along a ladder, with their spread over seeds."""
    errors = [deviation or 0 for deviation in curve.spreads]
    axis.errorbar(curve.stops, curve.means, errors, marker="o", capsize=3, **style)


def scale_axes(axis: Axes, stops: list[float]) -> None:
    """Both axes by their logarithms: the stops of a ladder are what is told of one, plain numbers of the other."""
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(stops, [stop_text(stop) for stop in stops])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(PlainLogFormatter())
    axis.yaxis.set_minor_formatter(PlainLogFormatter())
    axis.grid(alpha=0.3, which="both")


def stops_of(entrants: dict[str, Summary], kind: str) -> list[float]:
    """The stops of a ladder that any entrant has come to, in rising order."""
    return sorted({stop for summary in entrants.values() for stop in summary["curves"][kind].stops})


def plot_ranking(score: str, entrants: dict[str, Summary], kind: str, path: Path) -> None:
    """The score of each entrant at the only stop of a ladder, best first, with the spread over seeds; ours in black."""
    (stop,) = stops_of(entrants, kind)
    scored = [(name, summary["curves"][kind]) for name, summary in entrants.items() if summary["curves"][kind].means]
    scored.sort(key=lambda item: item[1].means[0])
    figure, axis = plt.subplots(figsize=(7, 1 + 0.22 * len(scored)), layout="constrained")
    for row, (name, curve) in enumerate(scored):
        colour = "black" if is_ours(name) else "tab:blue"
        axis.errorbar(curve.means, [row], xerr=[curve.spreads[0] or 0], marker="o", capsize=3, color=colour)
    axis.set_yticks(range(len(scored)), [name for name, _ in scored], fontsize="small")
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel=f"{score.upper()} at {stop_text(stop)} {LABELS[kind]}")
    for set_formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        set_formatter(PlainLogFormatter())
    axis.grid(alpha=0.3, which="both", axis="x")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def is_ours(name: str) -> bool:
    """That an entrant of that name is `adaptive`, by whatever output or learning rate."""
    return name.startswith("adaptive") and not name.startswith(RIVALS)


def looks(entrants: dict[str, Summary]) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """{name: (what the legend calls it, how its lines look)}, the same in all plots; our own method stands out. Of many
    entrants the best and the best of ours are told apart, by their last mean score, and the others are grey."""
    grey = {"color": "0.8", "linewidth": 1, "zorder": 1}
    ours = iter(cycle(OURS))

    def last_score(name):
        return min((curve.means[-1] for curve in entrants[name]["curves"].values() if curve.means), default=math.inf)

    ranked = sorted(entrants, key=last_score)
    best_of_ours = next(filter(is_ours, ranked), None)
    shown = {*ranked[:SHOWN], *ALWAYS_SHOWN, best_of_ours} if len(ranked) > 2 * SHOWN else entrants
    others = [name for name in entrants if name not in shown]
    labels = dict.fromkeys(others) | dict.fromkeys(others[:1], "others")  # once in the legend
    styles = iter(cycle(STYLES))
    return {
        name: (labels[name], grey) if name in labels else (name, next(ours if is_ours(name) else styles))
        for name in entrants
    }


def plot_densities(entrants: dict[str, Summary], path: Path) -> None:
    """p_t and the objective p_t * w_t of each entrant, early and late in the first run that logged them."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for name, (label, style) in looks(entrants).items():
        run = next((run for run in entrants[name]["runs"] if "density" in run), None)
        for column, when in enumerate(("early", "late") if run else ()):
            density, weight = (run[kind][when] for kind in ("density", "weight"))
            objective = [p * w for p, w in zip(density, weight, strict=True)]
            positions = [(i + 0.5) / len(density) for i in range(len(density))]
            for row, table in enumerate((density, objective)):
                relative = [value * len(table) / sum(table) for value in table]
                once = label if (row, column) == (0, 0) else None
                axes[row, column].plot(positions, relative, label=once, **style)
    for column, when in enumerate(("early", "late")):
        axes[0, column].set(title=f"density $p_t$, {when}", ylim=(0, None))
        axes[1, column].set(title=f"objective $p_t w_t$, {when}", xlabel="$t / T$", ylim=(0, 5))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
