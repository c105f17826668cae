"""Which class each image of a run is of."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pipelines import find_label_ids

BALANCED = "balanced"


class ImageLabels(NamedTuple):
    """The classes of a run's images: image i is of the (i mod k)-th of k.

    Attributes:
        cycle: [k] the classes by number.
        names: [N] of all the model's classes.
    """

    cycle: list[int]
    names: list[str]

    def of(self, indices: Iterable[int]) -> list[int]:
        """The classes of images by their numbers."""
        return [self.cycle[i % len(self.cycle)] for i in indices]

    def to_settings(self) -> dict[str, Any]:
        """As a record has them."""
        is_balanced = self.cycle == list(range(len(self.names)))
        return {"class_labels": BALANCED if is_balanced else self.cycle, "class_names": self.names}


def parse_labels(given: Sequence[str] | None, id2label: dict[int, str]) -> ImageLabels:
    """The classes that the command line asks for: `balanced` or None for all in turn, or names and numbers.

    A name that looks like a number is a name.

    Raises:
        ValueError: there is no such class.
    """
    names = list(id2label.values())
    if given is None or list(given) == [BALANCED]:
        return ImageLabels(list(id2label), names)
    is_number = [re.fullmatch(r"-?[0-9]+", text) and text not in names for text in given]
    labels = [int(text) if number else text for text, number in zip(given, is_number, strict=True)]
    return ImageLabels(find_label_ids(labels, id2label), names)


def recorded_labels(settings: dict[str, Any]) -> ImageLabels | None:
    """The classes that `ImageLabels.to_settings` noted; None for an unconditional model."""
    if "class_labels" not in settings:
        return None
    names, cycle = settings["class_names"], settings["class_labels"]
    return ImageLabels(list(range(len(names))) if cycle == BALANCED else cycle, names)
