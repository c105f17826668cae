"""Labels of images, in a column of their rows."""

import datasets
import numpy as np

MAX_CLASSES = 100_000  # a network has a row of parameters for each


def label_columns(rows: datasets.Dataset) -> list[str]:
    """The columns that are labels by their type."""
    return [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]


def find_labels(name: str, rows: datasets.Dataset, chosen: str | None) -> tuple[str | None, list[str] | None]:
    """(The column of labels, the names of the classes). A chosen column may also be of strings or whole numbers, each
    of which is a class then; without a choice, only one of the type ClassLabel is taken.

    Raises:
        ValueError: the chosen column is not there, or holds no labels.
    """
    if chosen is None:
        found = label_columns(rows)
        return (found[0], list(rows.features[found[0]].names)) if len(found) == 1 else (None, None)
    if chosen not in rows.features:
        raise ValueError(f"--label_column {chosen}: {name} has no such column, but {', '.join(rows.features)}")
    feature = rows.features[chosen]
    if isinstance(feature, datasets.ClassLabel):
        return chosen, list(feature.names)
    values = set(rows[chosen][:]) if isinstance(feature, datasets.Value) else {None}
    if not (all(type(value) is int for value in values) or all(type(value) is str for value in values)):
        raise ValueError(f"--label_column {chosen} holds no labels, but {feature}, and all must have one")
    if len(values) > MAX_CLASSES:
        raise ValueError(f"--label_column {chosen} has {len(values):,} values: more than {MAX_CLASSES:,} classes")
    return chosen, [str(value) for value in sorted(values)]


def encode_labels(rows: datasets.Dataset, column: str, classes: list[str]) -> np.ndarray:
    """int64 [N] the labels in a column, as indices into `classes`; -1 is none."""
    values = rows[column][:]
    if isinstance(rows.features[column], datasets.ClassLabel):
        return np.array([-1 if value is None else value for value in values], dtype=np.int64)
    numbers = {name: i for i, name in enumerate(classes)}
    return np.array([numbers[str(value)] for value in values], dtype=np.int64)


def npz_label_problem(labels: np.ndarray, num_images: int) -> str | None:
    """Why an array of an .npz is no labels of its images, for an error; None if it is."""
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        return f"arr_1 is {labels.dtype} {list(labels.shape)}, and not of whole numbers [{num_images}]"
    if not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        return f"arr_1 has numbers from {labels.min()} to {labels.max()}, and not in [0, {MAX_CLASSES})"
    return None
