"""A name -> rows of undecoded images: a Hub data set, parquet, `save_to_disk`, a folder, an .npz, or the digits."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .folders import Listing, has_only_archives, list_folder
from .labels import encode_labels, find_labels, label_columns, npz_label_problem
from .metadata import apply_metadata
from .records import GRID, TRAINING_RECORD, check_finished, images_of, read_record
from .splits import ImageFiles, files_of_split, find_splits, slice_ranges

NPZ_LABELS = "arr_1"
Ranges = list[tuple[str, range]]  # of `slice_ranges`


@dataclass
class Source:
    """The images of one split, undecoded.

    Attributes:
        name: as the user gave it.
        images: what `decode_image` takes, one by one or as slices.
        rows: the images, and for class folders the column `label`, as of `datasets`' imagefolder; None for arrays.
        column: of `rows`, where the images are.
        classes: their names; None where the images have no labels, or several that nobody chose from.
        label_column: of `rows`, where the labels are.
        label_columns: all that are labels by their type.
        label_array: int64 [N], of arrays, as an .npz has them.
        label_problem: why an .npz has none, though there is an array for them.
        empty_classes: folders at the level of the classes that hold no image.
        files: how many files were looked at; None if they are not images.
        left_out: {why: how many}.
        notes: what a person should be told.
    """

    name: str
    images: Sequence
    rows: datasets.Dataset | None = None
    column: str | None = None
    classes: list[str] | None = None
    label_column: str | None = None
    label_columns: list[str] = field(default_factory=list)
    label_array: np.ndarray | None = None
    label_problem: str | None = None
    empty_classes: list[str] = field(default_factory=list)
    files: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def select(self, indices: Sequence[int], left_out: str) -> "Source":
        """The images at these indices; the others are counted, under the name of `left_out`."""
        left_out = {**self.left_out, left_out: len(self.images) - len(indices)}
        if self.rows is None:
            labels = None if self.label_array is None else self.label_array[list(indices)]
            return replace(self, images=self.images[list(indices)], label_array=labels, left_out=left_out)
        rows = self.rows.select(indices)
        return replace(self, images=rows[self.column], rows=rows, left_out=left_out)

    def why_no_labels(self) -> str:
        """What to say to who asked for them, behind the name."""
        if self.label_columns:
            return f"has label columns {self.label_columns}: choose one by --label_column"
        if self.label_problem:
            return f"has no labels: {self.label_problem}"
        return "has no labels: neither a column of them (--label_column names it) nor a folder for each class"

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int64 [N], indices into `classes`; -1 is none, as in `datasets`. None where there are no labels at all."""
        if self.label_column is None:
            return self.label_array
        return encode_labels(self.rows, self.label_column, self.classes)


@dataclass(frozen=True)
class Request:
    """What was asked for: `name` as the user gave it, and what of it; see `open_images`."""

    name: str
    config_name: str | None
    split: str
    cache_dir: str | None
    image_column: str | None
    label_column: str | None


def open_source(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Find what a name means, and open one split of it, or a slice of one.

    Raises:
        ValueError: naming the flag, if there is no such source, split, image column or label column.
    """
    request = Request(name, config_name, split, cache_dir, image_column, label_column)
    path = Path(name).expanduser()
    if name == "digits":
        source = _digits(request)
        if path.is_dir():
            source.notes.append("the data set built into scikit-learn is used; ./digits means the folder of that name")
        return source
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _from_npz(request, path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_rows(request, _saved_rows(request, path))
    if path.is_dir():
        return _from_folder(request, path)
    return _from_datasets(request, path)


# --------------------------------------------------------------------------------------------------- folders


def _from_folder(request: Request, path: Path) -> Source:
    """A local folder of images, of ours, or of files that `datasets` reads."""
    if (path / TRAINING_RECORD).is_file():
        raise ValueError(
            f"--dataset_name {request.name} is the folder of a training run ({TRAINING_RECORD}), whose samples are "
            "grids: let generate.py draw images from it into a folder of their own"
        )
    record = read_record(path)
    if record:
        return _from_generated(request, path, record)
    listing = list_folder(path)
    if has_only_archives(listing):
        raise ValueError(f"--dataset_name {request.name} holds archives only ({_kinds(listing)}): unpack them")
    if not listing.images:
        return _from_datasets(request, path)
    if listing.data_files:
        raise ValueError(
            f"--dataset_name {request.name} holds images ({listing.images[0]}) and data files "
            f"({listing.data_files[0]}): name one of them, or a folder of one kind"
        )
    if request.config_name is not None:
        raise ValueError(f"--dataset_config_name {request.config_name}: a folder of images has no configurations")
    return _from_image_files(request, path, listing)


def _from_generated(request: Request, path: Path, record: dict[str, Any]) -> Source:
    """A folder of generate.py: its images, of which all must be there, without the grid."""
    images = images_of(path, record)
    if images.suffix == ".npz":
        source = _from_npz(request, images)
    elif record["settings"]["format"] == "parquet":
        source = _from_datasets(replace(request, config_name=None), images)
    else:
        source = _from_image_files(request, images, list_folder(images))
    source.notes.append(f"a folder of generate.py: its images, and not its {GRID}")
    if record["status"] != "complete" or request.split == "train":
        check_finished(path, record, len(source.images))
    return source


def _from_image_files(request: Request, root: Path, listing: Listing) -> Source:
    """The images of a listing, by its metadata, splits and classes."""
    num_metadata = len(listing.metadata)
    files = len(listing.images) + sum(n for why, n in listing.left_out.items() if "folder" not in why)
    paths = apply_metadata(root, listing)
    files += num_metadata
    prefixes = find_splits(paths)
    splits = {each: files_of_split(paths, prefixes[each]) for each in prefixes}
    ranges = slice_ranges(request.name, request.split, {each: len(found.paths) for each, found in splits.items()})
    chosen = _choose(splits, ranges)
    _count_unchosen(listing, paths, splits, ranges, request.split)
    empty_classes = _note_empty_folders(listing, chosen, prefixes, ranges)
    if not chosen.paths:
        raise ValueError(f"--dataset_name {request.name}: the split {request.split!r} holds no images, of {len(paths)}")
    source = _from_rows(request, _image_file_rows(root, chosen))
    source.files, source.empty_classes = files, empty_classes
    source.left_out, source.notes = dict(listing.left_out), listing.notes
    return source


def _choose(splits: dict[str, ImageFiles], ranges: Ranges) -> ImageFiles:
    """The parts of splits that a slice asks for; classes only where all the parts agree on them."""
    parts = [(splits[split], rows) for split, rows in ranges]
    paths = [path for part, rows in parts for path in part.paths[rows.start : rows.stop]]
    classes = parts[0][0].classes
    if classes is None or any(part.classes != classes for part, _ in parts):
        return ImageFiles(paths, None, None)
    return ImageFiles(paths, classes, [i for part, rows in parts for i in part.labels[rows.start : rows.stop]])


def _count_unchosen(
    listing: Listing, paths: list[str], splits: dict[str, ImageFiles], ranges: Ranges, split: str
) -> None:
    """Count the images of other splits, beside the splits, and outside the slice."""
    asked = {each for each, _ in ranges}
    for each, found in splits.items():
        if each not in asked:
            listing.left_out[f"image of split {each}"] += len(found.paths)
    beside = len(paths) - sum(len(found.paths) for found in splits.values())
    if beside:
        images = "1 image lies" if beside == 1 else f"{beside:,} images lie"
        listing.notes.append(f"{images} beside the folders of the splits ({', '.join(splits)}), and are left out")
        listing.left_out["image beside the splits"] += beside
    outside = sum(len(splits[each].paths) for each in asked) - sum(len(rows) for _, rows in ranges)
    if outside > 0:
        listing.left_out[f"image outside {split}"] += outside


def _note_empty_folders(
    listing: Listing, chosen: ImageFiles, prefixes: dict[str, list[str]], ranges: Ranges
) -> list[str]:
    """The folders at the level of the classes that hold no image; it is noted, as people count classes by folders."""
    if chosen.classes is None:
        return []
    level = {prefix for split, _ in ranges for prefix in prefixes[split]}
    names = {folder[len(p) :] for folder in listing.folders for p in level if folder.startswith(p)}
    empty = sorted(name for name in names if name and "/" not in name and name not in chosen.classes)
    if empty:
        listing.notes.append(f"no class for {', '.join(empty[:10])}: no image in a folder of that name")
    return empty


def _image_file_rows(root: Path, files: ImageFiles) -> datasets.Dataset:
    """Columns `image`, and `label` if there are classes, as `datasets`' imagefolder has them."""
    columns = {"image": [f"{root}/{path}" for path in files.paths]}
    features = {"image": datasets.Image(decode=False)}
    if files.classes is not None:
        columns["label"] = files.labels
        features["label"] = datasets.ClassLabel(names=files.classes)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _kinds(listing: Listing) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(listing.left_out.items()))


# ----------------------------------------------------------------------------------------------- other sources


def _digits(request: Request) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8, and which they are. They come with scikit-learn."""
    from sklearn.datasets import load_digits

    for flag, only in (("image_column", "image"), ("label_column", "label")):
        if getattr(request, flag) not in (None, only):
            raise ValueError(f"--{flag} {getattr(request, flag)}: of the digits it is {only}")
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None]  # grey levels 0..16
    pixels, labels = _rows_of_arrays(request, pixels, digits.target)
    return Source(request.name, pixels, classes=[str(digit) for digit in digits.target_names], label_array=labels)


def _rows_of_arrays(request: Request, *arrays: np.ndarray) -> list[np.ndarray]:
    """Those rows of the arrays [N, ...] that the request's split says."""
    ranges = slice_ranges(request.name, request.split, {"train": len(arrays[0])})
    parts = [[array[rows.start : rows.stop] for _, rows in ranges] for array in arrays]
    return [of_array[0] if len(ranges) == 1 else np.concatenate(of_array) for of_array in parts]  # one is no copy


def _from_npz(request: Request, path: Path) -> Source:
    """The arrays of an .npz file, `arr_0`: uint8 [N, H, W, 1 or 3], and, if it is there, `arr_1`: the labels [N]; as
    ADM's evaluator has them."""
    if not path.is_file():
        raise ValueError(f"--dataset_name: {path}: no such file")
    try:
        with np.load(path) as arrays:
            pixels, labels = arrays["arr_0"], arrays.get(NPZ_LABELS)
    except Exception as error:  # of zip, of NumPy's format, or no such key
        raise ValueError(f"--dataset_name: {path} has no readable array arr_0: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
        raise ValueError(
            f"--dataset_name: {path}: arr_0 must be uint8 [N, H, W, 1 or 3], not {pixels.dtype} {list(pixels.shape)}"
        )
    if request.label_column not in (None, NPZ_LABELS):
        raise ValueError(f"--label_column {request.label_column}: the labels in an .npz are {NPZ_LABELS}")
    problem = None if labels is None else npz_label_problem(labels, len(pixels))
    if labels is None or problem:
        return Source(request.name, *_rows_of_arrays(request, pixels), label_problem=problem)
    classes = [str(label) for label in range(labels.max() + 1)]
    pixels, labels = _rows_of_arrays(request, pixels, labels.astype(np.int64))
    return Source(request.name, pixels, classes=classes, label_array=labels)


def _saved_rows(request: Request, path: Path) -> datasets.Dataset:
    splits = _call(request.name, datasets.load_from_disk, dataset_path=str(path))
    if isinstance(splits, datasets.Dataset):  # a single split
        splits = {str(splits.split or "train"): splits}
    ranges = slice_ranges(request.name, request.split, {each: len(rows) for each, rows in splits.items()})
    parts = [splits[each].select(rows) for each, rows in ranges]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _from_datasets(request: Request, path: Path) -> Source:
    """What the `datasets` library reads: parquet and others in a folder, or the Hub."""
    arguments = {"name": request.config_name, "split": request.split, "cache_dir": request.cache_dir}
    arguments |= _location(request.name, path)
    return _from_rows(request, _call(request.name, datasets.load_dataset, **arguments))


def _location(name: str, path: Path) -> dict[str, str]:
    """Arguments that tell `datasets.load_dataset` to read a local folder, a .parquet file, or the Hub."""
    if path.is_dir():  # absolute, because a folder named "csv" would be taken for the reader of csv files
        return {"path": str(path.resolve())}
    if path.is_file() and path.suffix.lower() == ".parquet":
        return {"path": "parquet", "data_files": str(path)}
    if path.is_file():
        raise ValueError(f"--dataset_name {name} is a file: give a folder of images, or a .parquet or .npz file")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):  # cannot be on the Hub: no need to ask the network
        raise ValueError(f"--dataset_name {name}: no such folder, and not the name of a Hub dataset")
    return {"path": name}


def _call(name: str, load: Callable, /, **arguments: Any) -> Any:
    """Call a loader of the `datasets` library, and sum up its error in one ValueError."""
    try:
        return load(**arguments)
    except Exception as error:  # from the network, the Hub, the file system, Arrow, or any reader of a format
        # A DatasetGenerationError keeps what went wrong (a corrupt file, a full disk) in its cause.
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generating and error.__cause__ else error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    if not Path(name).expanduser().exists():
        reason = f"there is no such folder, and from the Hugging Face Hub: {reason}"
    if "onfig" in reason:
        reason += " (--dataset_config_name chooses the configuration)"
    raise ValueError(f"--dataset_name {name} cannot be loaded: {reason}")  # outside the except: one traceback


def _from_rows(request: Request, rows: datasets.Dataset) -> Source:
    """Find the image column by its type, and leave it undecoded."""
    name, image_column = request.name, request.image_column
    columns = ", ".join(f"{column}: {feature}" for column, feature in rows.features.items())
    found = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if image_column is not None and image_column not in rows.features:
        raise ValueError(f"--image_column {image_column}: {name} has no such column, but {columns}")
    if image_column is None and len(found) > 1:
        raise ValueError(f"--dataset_name {name} has image columns {found}: choose one by --image_column")
    if image_column is None and not found:
        raise ValueError(f"--dataset_name {name} has no image column, but {columns}")
    column = image_column or found[0]
    try:  # a named column of raw bytes or of paths is taken as well
        rows = rows.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--image_column {column} holds no images, but {rows.features[column]}") from error
    label_column, classes = find_labels(request.name, rows, request.label_column)
    return Source(request.name, rows[column], rows, column, classes, label_column, label_columns(rows))
