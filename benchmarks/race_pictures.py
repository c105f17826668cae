"""The picture of docs/results.md: FD against time or images, a panel a race, ours and the best rival in colour.

    python benchmarks/race_pictures.py

Drawn from the records in benchmarks/results/, where the command that made each stands beside it. Takes seconds.
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comparison.plots import LABELS, LINES, draw_curve, is_ours, scale_axes, stops_of
from comparison.summary import Curve, rank, summarise

matplotlib.use("agg")

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
COLUMNS = 3
RACES = {
    "race_cifar10_unet": "CIFAR-10, U-Net",
    "race_cifar10_dit": "CIFAR-10, transformer",
    "race_cifar10_latents": "CIFAR-10 in latents, transformer",
    "race_digits_dit": "digits, transformer",
    "race_long_cifar10_unet": "CIFAR-10, U-Net, ten times as long",
}


@dataclass
class RacePictureOptions:
    """Options of benchmarks/race_pictures.py."""

    output_png: str = field(default=str(REPOSITORY / "docs" / "races.png"), metadata={"help": "The picture."})


def main(options: RacePictureOptions) -> None:
    figure = draw({title: json.loads((RESULTS / name / "results.json").read_text()) for name, title in RACES.items()})
    figure.savefig(options.output_png, dpi=90)
    plt.close(figure)


def draw(races: dict[str, dict[str, Any]]) -> Figure:
    """A panel for each of {title: what compare.py has left}."""
    rows = -(-len(races) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(13, 3.8 * rows), squeeze=False, layout="constrained")
    for axis, (title, results) in zip(axes.flat, races.items(), strict=False):
        kind = next(iter(results["settings"]["ladders"]))  # time, where there is one of time
        entrants = summarise(results)
        ranked = sorted(entrants.items(), key=lambda item: rank(item[1], kind))
        draw_race(axis, {name: summary["curves"][kind] for name, summary in ranked})
        scale_axes(axis, stops_of(entrants, kind))
        axis.set(title=title, xlabel=LABELS[kind], ylabel=results["score"].upper())
    for axis in axes.flat[len(races) :]:
        axis.set_axis_off()
    return figure


def draw_race(axis: Axes, curves: dict[str, Curve]) -> None:
    """Scores along a ladder of {entrant: curve}, best first: ours in black, the best rival in colour, others grey."""
    best_rival = next((name for name in curves if not is_ours(name)), None)
    lines = cycle(LINES)
    for name, curve in sorted(curves.items()):
        if is_ours(name):
            style = {"color": "black", "linewidth": 2, "zorder": 3, "linestyle": next(lines), "label": name}
        elif name == best_rival:
            style = {"color": "tab:orange", "linewidth": 2, "zorder": 2, "label": name}
        else:
            style = {"color": "0.75", "linewidth": 1, "zorder": 1}
        draw_curve(axis, curve, markersize=4, **style)
    axis.legend(fontsize="small")


if __name__ == "__main__":
    main(HfArgumentParser(RacePictureOptions).parse_args_into_dataclasses()[0])
