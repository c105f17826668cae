"""The options of compare.py: named, explained and checked."""

import itertools
import re
from dataclasses import dataclass, field

from transformers.hf_argparser import HfArg

from pipelines import SCHEDULERS
from recipes import JsonDict, check_ranges, read_options
from samplers import METHODS

RANGES = {
    "learning_rates": "(0, inf)",
    "max_train_seconds": "(0, inf)",
    "score_at": "(0, 1]",
    "score_at_images": "[1, 2**53]",
    "seeds": "[0, 2**32)",
    "stop_after": "(0, inf)",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # safe as that of a folder
Ladders = dict[str, list[float]]  # {"seconds": [...], "images": [...]}, or one of them: where runs stop to be scored


@dataclass
class ComparisonOptions:
    """All other flags are those of the training script."""

    _recipe_block = "compare"

    config: str | None = HfArg(default=None, help="A recipe (YAML); flags override it. See configs/races/.")
    output_dir: str | None = HfArg(default=None, help="Where runs, results.json, the table and the plots go; required.")
    methods: list[str] = field(
        default_factory=list,
        metadata={"help": "Of the training script's, and of --variants; default: all."},
    )
    variants: JsonDict = field(
        default_factory=JsonDict,
        metadata={"help": 'Methods with other options of training, JSON: {"NAME": {"method": ..., OPTION: ...}, ...}.'},
    )
    learning_rates: list[float] = field(
        default_factory=list,
        metadata={"help": "Each method takes part by each of these, as adaptive_0.001; default: by its own."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each method has a run with each."})
    max_train_seconds: float | None = HfArg(
        default=None, help="Of training proper, for each run; this, or --score_at_images, is required."
    )
    score_at: list[float] = field(
        default_factory=lambda: [0.125, 0.25, 0.5, 1.0],
        metadata={"help": "Fractions of --max_train_seconds at which runs are scored; the last must be 1."},
    )
    score_at_images: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of images trained on at which to score, too."}
    )
    score_samplers: list[str] = field(
        default_factory=lambda: ["ddpm"],
        metadata={"help": "ddpm, ddim: what draws the images scored; all but the first for the last scores alone."},
    )
    stop_after: float | None = HfArg(
        default=None, help="Seconds after which training goes on to no further stop; the same command goes on later."
    )
    join: list[str] = field(default_factory=list, metadata={"help": "Folders of other comparisons to report with it."})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("--output_dir is required (--help lists the flags)")
        if self.max_train_seconds is None and not self.score_at_images:
            raise ValueError("--max_train_seconds or --score_at_images is required (--help lists the flags)")
        self.methods = self.methods or list(dict.fromkeys([*METHODS, *self.variants]))
        for name in self.variants:
            if not NAME.fullmatch(name):
                raise ValueError(f"--variants {name}: must be letters, digits and _ . + - alone, as a folder's name")
        for flag, known in (("methods", {**METHODS, **self.variants}), ("score_samplers", SCHEDULERS)):
            for name in getattr(self, flag):
                if name not in known:
                    raise ValueError(f"--{flag} {name}: must be of {', '.join(known)}")
        check_ranges(self, RANGES)
        for flag in ("methods", "seeds", "score_at", "score_samplers"):
            if not getattr(self, flag):
                raise ValueError(f"--{flag}: must be given")
        for flag in ("methods", "learning_rates", "seeds", "score_at", "score_at_images", "score_samplers"):
            values = getattr(self, flag)
            if len(set(values)) < len(values):
                raise ValueError(f"--{flag} {' '.join(map(str, values))}: must hold each once")
        if sorted(self.score_at) != self.score_at or self.score_at[-1] != 1:
            raise ValueError(f"--score_at {' '.join(map(str, self.score_at))}: must rise from above 0 to 1")
        if sorted(self.score_at_images) != self.score_at_images:
            raise ValueError(f"--score_at_images {' '.join(map(str, self.score_at_images))}: must rise")

    @property
    def entrants(self) -> dict[str, tuple[str, dict[str, float]]]:
        """{name: (method, options in place of its own)} of those that take part: the methods, or each by each rate."""
        if not self.learning_rates:
            return {method: (method, {}) for method in self.methods}
        pairs = itertools.product(self.methods, self.learning_rates)
        return {f"{method}_{rate}": (method, {"learning_rate": rate}) for method, rate in pairs}

    @property
    def ladders(self) -> Ladders:
        """Where each run stops to be scored; seconds in whole milliseconds, as a run's summary has them."""
        seconds = self.max_train_seconds
        stops = {"seconds": [round(share * seconds, 3) for share in self.score_at]} if seconds else {}
        return {**stops, "images": self.score_at_images} if self.score_at_images else stops


def read_command_line(argv: list[str]) -> tuple[ComparisonOptions, list[str]]:
    """(The options of a comparison, the words for the training script), of a command line.

    Raises:
        ValueError: naming the flag, or the recipe's line.
    """
    options, training_flags = read_options(ComparisonOptions, argv)
    return options, [*(["--config", options.config] if options.config else []), *training_flags]
