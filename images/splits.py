"""Splits and classes of a folder of images, from the names of its sub-folders; slices of any split."""

import re
from dataclasses import dataclass

from datasets import ReadInstruction
from datasets.data_files import SPLIT_KEYWORDS

# "train", "Training", "val2017", "test-00"; but "train station" is a class, and "photo of a train.png" an image
SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}


@dataclass
class ImageFiles:
    """The images of one split: paths, and for class folders their sorted names and each image's index into them."""

    paths: list[str]
    classes: list[str] | None
    labels: list[int] | None


def find_splits(paths: list[str]) -> dict[str, list[str]]:
    """{split: the prefixes of its paths}. Without folders that are named as splits, all is "train"."""
    base = _common_folder(paths)
    folders = {path[len(base) :].partition("/")[0] for path in paths if "/" in path[len(base) :]}
    names = {folder: _split_name(folder) for folder in sorted(folders)}
    if not names or None in names.values():
        return {"train": [""]}
    splits: dict[str, list[str]] = {}
    for folder, split in names.items():
        splits.setdefault(split, []).append(f"{base}{folder}/")
    return splits


def _common_folder(paths: list[str]) -> str:
    """The folder around all images, where it is the only one at its level, as in images/train/ and images/val/."""
    base = ""
    while True:
        folders = {path[len(base) :].partition("/")[:2] for path in paths}
        if len(folders) != 1 or _split_name(name := next(iter(folders))[0]) or not next(iter(folders))[1]:
            return base
        base += f"{name}/"


def _split_name(folder: str) -> str | None:
    return SPLITS.get(re.sub(r"[-._ 0-9]+$", "", folder).lower())


def files_of_split(paths: list[str], prefixes: list[str]) -> ImageFiles:
    """The images under these prefixes. Their first-level folders are classes, if no image lies beside them."""
    inside = [(path, path[len(prefix) :]) for path in paths for prefix in prefixes if path.startswith(prefix)]
    chosen = [path for path, _ in inside]
    if not inside or any("/" not in rest for _, rest in inside):
        return ImageFiles(chosen, None, None)
    names = [rest.partition("/")[0] for _, rest in inside]
    classes = sorted(set(names))
    numbers = {name: i for i, name in enumerate(classes)}
    return ImageFiles(chosen, classes, [numbers[name] for name in names])


def slice_ranges(name: str, split: str, sizes: dict[str, int]) -> list[tuple[str, range]]:
    """What "train[10%:20%]" or "train+test" means: [(split, rows)].

    Args:
        sizes: {split: its number of images}.

    Raises:
        ValueError: there is no such split, or it cannot be understood.
    """
    try:
        instruction = ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"--dataset_name {name}: the split {split!r} cannot be understood: {error}") from error
    try:
        return [(part.splitname, range(part.from_, part.to)) for part in instruction.to_absolute(sizes)]
    except (ValueError, AssertionError) as error:
        if any(re.split(r"[\[(]", part)[0].strip() not in sizes for part in split.split("+")):
            raise ValueError(f"--dataset_name {name} has no split {split!r}, but {sorted(sizes)}") from None
        raise ValueError(f"--dataset_name {name}: the split {split!r} cannot be understood: {error}") from error
