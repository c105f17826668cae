"""Is this file an image? Its extension decides where it can, else its content."""

import os
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

# Pillow only tells what these are, or needs another program to draw them, or takes them for pages.
NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# Formats without a signature: Pillow's readers would take some files of any other kind for one of these.
NO_SIGNATURE = {"IM", "IMT", "IPTC", "PCD", "SPIDER", "TGA"}

# A camera's raw file is often a TIFF, of which Pillow would read the thumbnail.
CAMERA_RAW = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
# Images that people have and Pillow may not read: they must turn up as bad images, not go missing.
MAYBE_UNREADABLE = CAMERA_RAW | {".avif", ".heic", ".heif", ".hif", ".jp2", ".jxl", ".svg", ".svgz", ".webp"}

ARCHIVES = {".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip", ".zst"}
DATA_FILES = {".arrow", ".parquet"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Not worth opening to see that they are no images; an unfinished download or copy must not be taken for one.
OTHER = {
    ".bin", ".bufr", ".cfg", ".ckpt", ".conf", ".crdownload", ".csv", ".db", ".doc", ".docx", ".emf", ".eps", ".grib",
    ".h5", ".hdf", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".lock", ".log", ".md", ".mkv", ".mov",
    ".mp3", ".mp4", ".mpeg", ".mpg", ".npy", ".npz", ".onnx", ".part", ".partial", ".pdf", ".pickle", ".pkl", ".ps",
    ".pt", ".pth", ".py", ".rst", ".safetensors", ".sh", ".sqlite", ".tar", ".tfrecord", ".tmp", ".toml", ".tsv",
    ".txt", ".wav", ".wmf", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
}  # fmt: skip
NEVER_IMAGES = ARCHIVES | DATA_FILES | OTHER


def extension_of(name: str) -> str:
    """Lower case, with its dot; "" if there is none."""
    return os.path.splitext(name)[1].lower()


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of the pictures that Pillow opens, and of those that it may not."""
    extensions = Image.registered_extensions()  # which loads all of Pillow's plugins
    readable = {extension for extension, kind in extensions.items() if kind in Image.OPEN.keys() - NOT_PICTURES}
    return frozenset(readable | MAYBE_UNREADABLE | {".mpo"})


def has_image_name(path: Path | str) -> bool:
    """Whether the extension is an image's."""
    return extension_of(os.fspath(path)) in image_extensions()


def is_image_file(path: Path | str) -> bool:
    """Whether a file counts as an image. One with an image's extension does, whatever it holds."""
    return has_image_name(path) or (extension_of(os.fspath(path)) not in NEVER_IMAGES and _holds_an_image(path))


def _holds_an_image(path: Path | str) -> bool:
    formats = [name for name in Image.OPEN if name not in NOT_PICTURES | NO_SIGNATURE]
    try:
        with Image.open(path, formats=formats):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # a picture too large, or one that cannot be opened: to be reported, not passed over
        return True
