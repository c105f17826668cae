"""Runs of the same method, different in their seeds, as a row of a table."""

import statistics
from collections.abc import Sequence
from typing import Any

BASELINE = "ddpm"  # speed-ups are over this method, where it takes part
Summary = dict[str, Any]


def summarise(results: dict[str, Any]) -> dict[str, Summary]:
    """{method: {"times", "means", "spreads", "images_per_second", "speed_up", "speed_up_is_lower_bound", "runs",
    "failed"}}."""
    methods = {}
    for run in results["runs"].values():
        summary = methods.setdefault(run["method"], {"runs": [], "failed": []})
        summary["failed" if "failed" in run else "runs"].append(run)
    for summary in methods.values():
        columns = list(zip(*(run["scores"] for run in summary["runs"]), strict=False))
        summary["times"] = [column[0]["budget"] for column in columns]
        summary["means"] = [statistics.mean(score["score"] for score in column) for column in columns]
        summary["spreads"] = [spread([score["score"] for score in column]) for column in columns]
        rates = [run["scores"][-1]["images"] / run["scores"][-1]["seconds"] for run in summary["runs"] if run["scores"]]
        summary["images_per_second"] = statistics.mean(rates) if rates else None
    baseline = methods.get(BASELINE, {}).get("means")
    for summary in methods.values():
        summary["speed_up"] = speed_up(summary, baseline[-1]) if baseline else None
        summary["speed_up_is_lower_bound"] = bool(baseline and summary["means"] and summary["means"][0] < baseline[-1])
    return methods


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def speed_up(summary: Summary, target: float) -> float | None:
    """The whole time over the time at which the mean score first reached `target`, linear between two scores.

    None if it never did; where the first score is already better, a lower bound."""
    times, means = summary["times"], summary["means"]
    for i, (time, mean) in enumerate(zip(times, means, strict=True)):
        if mean <= target:
            if i > 0:
                share = (means[i - 1] - target) / (means[i - 1] - mean)
                time = times[i - 1] + share * (time - times[i - 1])
            return times[-1] / time
    return None


def speed_up_text(summary: Summary) -> str:
    """The speed-up as a cell of the table: "1.29×", "≥2.00×" of a lower bound, "–" of none."""
    if summary["speed_up"] is None:
        return "–"
    return "≥" * summary["speed_up_is_lower_bound"] + f"{summary['speed_up']:.2f}×"


def table(results: dict[str, Any], methods: dict[str, Summary]) -> str:
    """The results as Markdown."""
    times = max((summary["times"] for summary in methods.values()), key=len)
    name = results["score"].upper()
    header = ["method", *(f"{name} at {time:,.0f} s" for time in times), "speed-up", "images/s", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method, summary in sorted(methods.items(), key=lambda item: (item[1]["means"] or [float("inf")])[-1]):
        cells = [
            f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")
            for mean, deviation in zip(summary["means"], summary["spreads"], strict=True)
        ]
        cells += ["–"] * (len(times) - len(cells))
        rate = summary["images_per_second"]
        cells += [speed_up_text(summary), f"{rate:,.0f}" if rate else "–", str(len(summary["runs"]))]
        cells[-1] += f" ({len(summary['failed'])} failed)" if summary["failed"] else ""
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    failures = [
        f"`{run['method']}`, seed {run['seed']}: {run['failed']}" for s in methods.values() for run in s["failed"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            "Lower is better; mean ± standard deviation over seeds. Speed-up: the time that "
            f"`{BASELINE}` had, over that at which the method's mean score reached its final one; ≥ where its first "
            "score is already better.",
            f"Device: {results['device']}. `{results['command']}`",
            *failures,
            "",
        ]
    )
