"""The options of compare.py: named, explained and checked."""

from dataclasses import dataclass, field

from recipes import JsonDict, check_ranges
from samplers import METHODS

RANGES = {"max_train_seconds": "(0, inf)", "seeds": "[0, 2**32)", "score_at": "(0, 1]"}


@dataclass
class ComparisonOptions:
    """All other flags are those of the training script."""

    output_dir: str = field(metadata={"help": "Where runs, results.json, the table and the plots go."})
    max_train_seconds: float = field(metadata={"help": "Of training proper, for each run."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Default: all."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Runs of each method."})
    score_at: list[float] = field(
        default_factory=lambda: [0.125, 0.25, 0.5, 1.0], metadata={"help": "Fractions of the time; the last is 1."}
    )
    sampler_options: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "--timestep_sampler_options by method, JSON."}
    )
    join: list[str] = field(default_factory=list, metadata={"help": "Folders of other comparisons to report with it."})

    def __post_init__(self):
        for flag, methods in (("methods", self.methods), ("sampler_options", self.sampler_options)):
            for method in methods:
                if method not in METHODS:
                    raise ValueError(f"--{flag} {method}: must be of {', '.join(METHODS)}")
        check_ranges(self, RANGES)
        for flag in ("methods", "seeds", "score_at"):
            values = getattr(self, flag)
            if len(set(values)) < len(values) or not values:
                raise ValueError(f"--{flag} {' '.join(map(str, values))}: must be given, and each once")
        if sorted(self.score_at) != self.score_at or self.score_at[-1] != 1:
            raise ValueError(f"--score_at {' '.join(map(str, self.score_at))}: must rise from above 0 to 1")
