"""Images, files and sources of every kind, made small."""

import io
import itertools

import datasets
import numpy as np
import torch
from PIL import Image

from images import open_images, training_batches

BAD_BYTES = ["empty", "text", "truncated_png", "truncated_jpeg"]
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, image_format="PNG", **options):
    """The bytes of a PIL image (or uint8 array) as a file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def random_pixels(num_images, size=8, channels=3, seed=0):
    """uint8 [N, H, W, 3], or [N, H, W] for one channel; all images differ."""
    shape = (num_images, size, size) + ((3,) if channels == 3 else ())
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_tensor(pixels):
    """[N, H, W(, 3)] array -> [N, C, H, W] tensor."""
    pixels = pixels if pixels.ndim == 4 else pixels[..., None]
    return torch.tensor(pixels.transpose(0, 3, 1, 2))


def rows_of(contents, column="image"):
    """A `datasets.Dataset` whose image column holds these bytes (or None)."""
    entries = [None if content is None else {"bytes": content, "path": None} for content in contents]
    return datasets.Dataset.from_dict(
        {column: entries, "label": list(range(len(entries)))},
        features=datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")}),
    )


def write_folder(folder, contents):
    """A folder of image files, whose names sort in the order of `contents`."""
    folder.mkdir(parents=True)
    for i, content in enumerate(contents):
        (folder / f"{i:04}.png").write_bytes(content)
    return folder


def write_parquet(folder, contents, name="train-00000-of-00001.parquet"):
    folder.mkdir(exist_ok=True)
    rows_of(contents).to_parquet(folder / name)
    return folder / name


def write_source(kind, root, contents):
    """Write `contents` as a source of this kind, and return its `dataset_name`."""
    root = root / kind
    if kind == "images":
        return write_folder(root, contents)
    if kind == "splits":
        write_folder(root / "test", contents[:1])
        write_folder(root / "train", contents)
    elif kind == "parquet":
        write_parquet(root, contents)
    elif kind == "parquet_file":
        return write_parquet(root, contents)
    elif kind == "saved":
        rows_of(contents).save_to_disk(root)
    elif kind == "saved_splits":
        splits = {"train": rows_of(contents), "test": rows_of(contents[:1])}
        datasets.DatasetDict(splits).save_to_disk(root)
    return root


def open_source(name, tmp_path, **options):
    return open_images(str(name), cache_dir=str(tmp_path / "cache"), **options)


def open_contents(tmp_path, contents, kind="parquet", **options):
    return open_source(write_source(kind, tmp_path, contents), tmp_path, **options)


def decode(dataset):
    return dataset.decode_all(num_workers=2, show_progress=False)


def batches(dataset, count, batch_size=4, placement="memory", **options):
    """The first `count` batches, [count, B, C, H, W]."""
    options = {"seed": 0, "show_progress": False, **options}
    images = training_batches(dataset, batch_size, placement=placement, **options)
    return torch.stack(list(itertools.islice(images, count)))


LOOKS = [  # every way to look at image i
    lambda dataset, i: decode(dataset),
    lambda dataset, i: dataset[i],
    lambda dataset, i: batches(dataset, 1, batch_size=len(dataset), placement="stream"),
]


def bad_bytes(kind):
    if kind == "truncated_png":
        return encoded(random_pixels(1)[0])[:-60]
    if kind == "truncated_jpeg":
        return encoded(random_pixels(1, size=32)[0], "JPEG")[:-100]
    return {"empty": b"", "text": b"this is not an image"}[kind]


def contents_with_bad_ones(num_images, bad):
    """File contents, bad in several ways at the indices `bad`; and the pixels of all, had they been good."""
    pixels = random_pixels(num_images)
    contents = [encoded(p) for p in pixels]
    for i, kind in zip(bad, itertools.cycle(BAD_BYTES), strict=False):
        contents[i] = bad_bytes(kind)
    return contents, as_tensor(pixels)


def sixteen_bits(values, mode):
    image = Image.new("I;16" if mode == "I;16" else mode, (len(values), 1))
    image.putdata(values)
    return image
