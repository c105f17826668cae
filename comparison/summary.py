"""Runs of the same entrant, different in their seeds, as a row of a table."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

PLAIN = {"method": "ddpm"}  # speed-ups are over the entrant with these options, else over `ddpm`
UNITS = {"seconds": "s", "images": "images"}
SAMPLED_BY = {"ddpm": "", "ddim": " by DDIM"}  # in a column's title; other ways have their own name there
HEADINGS = {"seconds": "Equal time", "images": "Equal images"}
Summary = dict[str, Any]


class Curve(NamedTuple):
    """An entrant's scores at the stops that all its runs have reached, of one ladder.

    Attributes:
        stops: [n] seconds of training, or images.
        means, spreads: [n] over seeds, by the first of the samplers; a spread is None of a single seed.
        images: [n] (fewest, most) that had been trained on there, over seeds.
        others: {sampler: (mean, spread)} by the others, at the last stop of the ladder.
        speed_up: see `against`; None where the baseline's last score was never reached, or there is no baseline.
        is_lower_bound: the first score is already better.
    """

    stops: list[float]
    means: list[float]
    spreads: list[float | None]
    images: list[tuple[float, float]]
    others: dict[str, tuple[float, float | None]]
    speed_up: float | None = None
    is_lower_bound: bool = False


def summarise(results: dict[str, Any]) -> dict[str, Summary]:
    """{entrant: {"curves": {"seconds": Curve, "images": Curve}, "images_per_second", "clipped", "runs", "failed"}}."""
    entrants = {}
    for run in results["runs"].values():
        summary = entrants.setdefault(run["entrant"], {"runs": [], "failed": []})
        summary["failed" if "failed" in run else "runs"].append(run)
    ladders, samplers = results["settings"]["ladders"], results["settings"]["score_samplers"]
    for summary in entrants.values():
        lasts = [run["scores"][-1] for run in summary["runs"] if run["scores"]]
        summary["curves"] = {kind: curve(summary["runs"], kind, stops, samplers) for kind, stops in ladders.items()}
        summary["images_per_second"] = mean([last["images"] / last["seconds"] for last in lasts])
        summary["clipped"] = mean([run["clipped"] for run in summary["runs"] if "clipped" in run])
    if (plain := baseline(results)) in entrants:
        for kind, reference in entrants[plain]["curves"].items():
            for summary in entrants.values() if reference.means else ():
                summary["curves"][kind] = against(summary["curves"][kind], reference)
    return entrants


def baseline(results: dict[str, Any]) -> str:
    """The entrant over which speed-ups are: the one that the results name, or the first that is plain DDPM, or else
    `ddpm`, with whatever options (a learning rate of its own, say), if that takes part."""
    if "baseline" in results:
        return results["baseline"]
    return next((name for name, entrant in results["entrants"].items() if entrant["options"] == PLAIN), "ddpm")


def curve(runs: list[dict[str, Any]], kind: str, stops: list[float], samplers: list[str]) -> Curve:
    """The scores of an entrant's runs along a ladder; without speed-ups."""
    columns = []
    for stop in stops:
        column = [score for run in runs if (score := score_at(run, kind, stop))]
        if not column or len(column) < len(runs):
            break
        columns.append(column)
    first, *others = samplers
    values = [[score["scores"][first] for score in column] for column in columns]
    last = columns[-1] if len(columns) == len(stops) else []
    return Curve(
        stops[: len(columns)],
        [statistics.mean(column) for column in values],
        [spread(column) for column in values],
        [(min(of_stop), max(of_stop)) for column in columns if (of_stop := [score["images"] for score in column])],
        {
            name: (mean(of_name), spread(of_name))
            for name in others
            if (of_name := [score["scores"][name] for score in last])
        },
    )


def score_at(run: dict[str, Any], kind: str, stop: float) -> dict[str, Any] | None:
    """A run's record of that stop: the first in which it had come as far; None before that."""
    return next((score for score in run["scores"] if score["reached"].get(kind, 0) >= stop), None)


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return statistics.mean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def against(curve: Curve, reference: Curve) -> Curve:
    """The curve with its speed-up over that of the baseline: the time, or number of images, at which the baseline's
    mean score first reached its last one, over that at which the curve's did.

    Both are first times: a baseline that had this score earlier, and lost it again, is not given the whole time. Where
    the first score is already better than what the baseline had reached by then, it is a lower bound."""
    target = reference.means[-1]
    needed = first_reached(curve, target)
    return curve._replace(
        speed_up=first_reached(reference, target) / needed if needed else None,
        is_lower_bound=bool(curve.means) and curve.means[0] < min(target, reference.means[0]),
    )


def first_reached(curve: Curve, target: float) -> float | None:
    """The time, or number of images, at which the mean score first reached `target`, linear between two scores; None if
    it never did. Where the first score is already better, this is its own."""
    stops, means = curve.stops, curve.means
    for i, (stop, score) in enumerate(zip(stops, means, strict=True)):
        if score <= target:
            if i > 0:
                share = (means[i - 1] - target) / (means[i - 1] - score)
                stop = stops[i - 1] + share * (stop - stops[i - 1])
            return stop
    return None


# As text


def table(results: dict[str, Any], entrants: dict[str, Summary]) -> str:
    """The results as Markdown: a section for each ladder."""
    sections = [
        f"## {HEADINGS[kind]}\n\n{section(results, entrants, kind)}\n" for kind in results["settings"]["ladders"]
    ]
    commands = "; ".join(f"`{command}`" for command in results["commands"])
    return "\n".join(
        [
            *sections,
            *notes(results, entrants),
            f"Device: {results['device']}. Commit: {', '.join(map(str, results['commits']))}. {commands}",
            *(
                f"`{run['entrant']}`, seed {run['seed']}: {run['failed']}"
                for s in entrants.values()
                for run in s["failed"]
            ),
            *(
                f"`{run['entrant']}`, seed {run['seed']}: failed before it went on: {failure}"
                for run in results["runs"].values()
                for failure in run.get("failed_before", [])
            ),
            "",
        ]
    )


def notes(results: dict[str, Any], entrants: dict[str, Summary]) -> list[str]:
    """How the tables are to be read: lines of text."""
    score, images = results["score"].upper(), results["settings"]["eval_num_images"]
    features, plain = results["feature_extractor"]["num_features"], baseline(results)
    lines = [
        "Lower is better; mean ± standard deviation over seeds of training. The first noise of the samples, and the "
        "images that they are compared with, are the same for all: what these do to a score, ± leaves out.",
        f"{score} of {images:,} images by {features:,} features is biased upwards: values compare within a table "
        "alone.",
    ]
    if any(shows_speed_up(results, entrants, kind) for kind in results["settings"]["ladders"]):
        lines.append(
            f"Speed-up: the time, or the images, after which `{plain}` first had its final mean score, over those "
            "after which the method had it; ≥ where the first score is already better."
        )
    if any(summary["failed"] for summary in entrants.values()):
        lines.append("An entrant of which a run failed is ranked last; its means are of its other runs.")
    return lines


def section(results: dict[str, Any], entrants: dict[str, Summary], kind: str) -> str:
    """The table of one ladder, best last score first; those of equal time say how many images a run had by then."""
    stops, (first, *others) = results["settings"]["ladders"][kind], results["settings"]["score_samplers"]
    score, any_clipped = results["score"].upper(), any(summary["clipped"] is not None for summary in entrants.values())
    by = {sampler: SAMPLED_BY.get(sampler, f" by {sampler}") for sampler in (first, *others)}
    shows_images, speed_up = kind == "seconds", shows_speed_up(results, entrants, kind)
    header = ["method"]
    for stop in stops:
        header += [f"{score}{by[first]} at {stop_text(stop)} {UNITS[kind]}", *(["images"] if shows_images else [])]
    header += [f"{score}{by[sampler]} at {stop_text(stops[-1])} {UNITS[kind]}" for sampler in others]
    header += [*(["speed-up"] if speed_up else []), "images/s", *(["clipped"] if any_clipped else []), "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, summary in sorted(entrants.items(), key=lambda item: rank(item[1], kind)):
        curve = summary["curves"][kind]
        cells = []
        for pair in zip(curve.means, curve.spreads, curve.images, strict=True):
            cells += [score_text(*pair[:2]), *([range_text(*pair[2])] if shows_images else [])]
        cells += ["–"] * (len(stops) * (1 + shows_images) - len(cells))
        cells += [score_text(*curve.others[sampler]) if sampler in curve.others else "–" for sampler in others]
        rate, clipped = summary["images_per_second"], summary["clipped"]
        cells += [*([speed_up_text(curve)] if speed_up else []), f"{rate:,.0f}" if rate else "–"]
        cells += [f"{clipped:.1%}" if clipped is not None else "–"] if any_clipped else []
        failed = f" ({len(summary['failed'])} failed)" if summary["failed"] else ""
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {len(summary['runs'])}{failed} |")
    return "\n".join(lines)


def shows_speed_up(results: dict[str, Any], entrants: dict[str, Summary], kind: str) -> bool:
    """That the table of a ladder has a column of speed-ups: from a single stop none can be read, nor without the
    baseline, as in a search of learning rates."""
    return len(results["settings"]["ladders"][kind]) > 1 and baseline(results) in entrants


def rank(summary: Summary, kind: str) -> tuple[bool, int, float]:
    """By what entrants are ranked: that no run failed, how far they have come, and their score there. The means of one
    of which a run failed are of those that went well, and no match for the others'."""
    curve = summary["curves"][kind]
    return bool(summary["failed"]), -len(curve.means), curve.means[-1] if curve.means else 0.0


def score_text(mean: float, deviation: float | None) -> str:
    """A score as a cell of the table: "2.257 ± 0.181"."""
    return f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


def stop_text(stop: float) -> str:
    """A stop, in seconds or images: "51,200", "12.5"."""
    return f"{stop:,.10g}"


def range_text(least: float, most: float) -> str:
    """Numbers of images as a cell of the table: "51,200", "48,000 to 51,200"."""
    return f"{least:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}"


def speed_up_text(curve: Curve) -> str:
    """The speed-up as a cell of the table: "1.29×", "≥2.00×" of a lower bound, "–" of none."""
    return "–" if curve.speed_up is None else "≥" * curve.is_lower_bound + f"{curve.speed_up:.2f}×"
