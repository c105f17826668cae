"""Every image source, every colour mode, corrupt files, and the order of the images."""

import io
import itertools
import types
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_digits

import image_data
from image_data import BadImage, decode_image, image_order, normalize, open_images, training_batches

CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no CIFAR-10 in {CIFAR10}")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SOURCES = ["images", "splits", "parquet", "parquet_file", "saved", "saved_splits"]
BAD_BYTES = ["empty", "text", "truncated_png", "truncated_jpeg"]


# -------------------------------------------------------------------------------------- making sources


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


@pytest.fixture(scope="module")
def digits():
    return open_images("digits")


def bad_bytes(kind):
    if kind == "truncated_png":
        return encoded(random_pixels(1)[0])[:-60]
    if kind == "truncated_jpeg":
        return encoded(random_pixels(1, size=32)[0], "JPEG")[:-100]
    return {"empty": b"", "text": b"this is not an image"}[kind]


# --------------------------------------------------------------------------------------------- sources


def test_digits_are_scikit_learns(digits):
    expected = np.rint(load_digits().images * 255 / 16)
    images = decode(digits)
    assert (digits.name, digits.channels, digits.resolution, len(digits)) == ("digits", 1, 8, 1797)
    assert images.dtype == torch.uint8
    assert images.shape == (1797, 1, 8, 8)
    assert digits.nbytes == images.nbytes
    assert np.array_equal(images[:, 0].numpy(), expected)
    assert images.min() == 0
    assert images.max() == 255


def test_digits_as_larger_colour_images():
    dataset = open_images("digits", resolution=16, image_mode="RGB")
    image = dataset[3]
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_very_pixels(kind, tmp_path):
    pixels = random_pixels(5)
    dataset = open_contents(tmp_path, [encoded(p) for p in pixels], kind)
    expected = as_tensor(pixels)
    assert (dataset.channels, dataset.resolution, len(dataset)) == (3, 8, 5)
    assert torch.equal(decode(dataset), expected)
    assert torch.equal(torch.stack([dataset[i] for i in range(5)]), expected)
    assert dataset[-1].equal(expected[-1])
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize("kind", ["splits", "saved_splits"])
def test_split(kind, tmp_path):
    pixels = random_pixels(3)
    dataset = open_contents(tmp_path, [encoded(p) for p in pixels], kind, split="test")
    assert torch.equal(decode(dataset), as_tensor(pixels[:1]))


def test_slice_of_a_split(tmp_path):
    pixels = random_pixels(4)
    dataset = open_contents(tmp_path, [encoded(p) for p in pixels], split="train[1:3]")
    assert torch.equal(decode(dataset), as_tensor(pixels[1:3]))


def test_folder_named_like_a_datasets_reader(tmp_path, monkeypatch):
    pixels = random_pixels(2)
    write_folder(tmp_path / "csv", [encoded(p) for p in pixels])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(decode(open_source("csv", tmp_path)), as_tensor(pixels))


def test_shuffled_and_selected_rows_keep_their_order(tmp_path):
    pixels = random_pixels(6)
    chosen = [5, 0, 3]
    rows_of([encoded(p) for p in pixels]).select(chosen).save_to_disk(tmp_path / "saved")
    dataset = open_source(tmp_path / "saved", tmp_path)
    assert torch.equal(decode(dataset), as_tensor(pixels[chosen]))
    assert torch.equal(dataset[1], as_tensor(pixels)[0])


@needs_cifar10
def test_cifar10(tmp_path):
    dataset = open_source(CIFAR10, tmp_path, split="test[:300]")
    assert (dataset.channels, dataset.resolution, len(dataset)) == (3, 32, 300)
    images = decode(dataset)
    rows = datasets.load_dataset(str(CIFAR10), split="test[:300]", cache_dir=str(tmp_path / "cache"))
    for i in (0, 63, 64, 299):  # across the rows that one thread decodes at a time
        assert np.array_equal(images[i].permute(1, 2, 0), np.asarray(rows[i]["img"]))


# ------------------------------------------------------------------------------ sources that are wrong


@pytest.mark.parametrize("name", ["digits", "images", "splits", "parquet", "saved", "saved_splits"])
def test_missing_split_lists_the_splits(name, tmp_path):
    if name != "digits":
        name = write_source(name, tmp_path, [encoded(p) for p in random_pixels(2)])
    with pytest.raises(ValueError, match=r"--dataset_name .*validation.*\[.*'train'.*\]") as error:
        open_source(name, tmp_path, split="validation")
    if "splits" in str(name):
        assert "test" in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such/folder", "not the name of a Hub dataset"),
        ("no/such/folder", "not the name of a Hub dataset"),
        ("./digits", "not the name of a Hub dataset"),
        ("two words", "not the name of a Hub dataset"),
        ("nosuch/one", "from the Hugging Face Hub: ConnectionError"),
    ],
)
def test_a_name_that_is_nothing(name, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"--dataset_name {name}.*no such folder.*{reason}") as error:
        open_source(name, tmp_path)
    assert error.value.__context__ is None  # the traceback of `datasets` would be printed with it


def test_hub_names_go_to_the_hub(tmp_path, monkeypatch):
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"--dataset_name uoft-cs/cifar10.*Hub: ConnectionError: no network"):
        open_source("uoft-cs/cifar10", tmp_path, dataset_config_name="plain_text", split="test")
    expected = {"path": "uoft-cs/cifar10", "name": "plain_text", "split": "test"}
    assert asked == {**expected, "cache_dir": str(tmp_path / "cache")}


def test_unknown_configuration(tmp_path):
    source = write_source("parquet", tmp_path, [encoded(random_pixels(1)[0])])
    with pytest.raises(ValueError, match=r"nosuch.*--dataset_config_name"):
        open_source(source, tmp_path, dataset_config_name="nosuch")


def test_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--dataset_name .*empty.*doesn't contain any data files"):
        open_source(tmp_path / "empty", tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"--dataset_name .*texts has no image column, but text: Value"):
        open_source(tmp_path / "texts", tmp_path)


def test_no_rows(tmp_path):
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"img": pyarrow.array([], "string")}), tmp_path / "parquet/train.parquet")
    with pytest.raises(ValueError, match=r"--dataset_name .*parquet "):
        open_source(tmp_path / "parquet", tmp_path)


def test_single_file(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(random_pixels(1)[0]))
    with pytest.raises(ValueError, match=r"--dataset_name .*image\.png is a file: give a folder"):
        open_source(tmp_path / "image.png", tmp_path)


def test_corrupt_parquet(tmp_path):
    path = write_source("parquet_file", tmp_path, [encoded(p) for p in random_pixels(200)])
    for content in (b"junk", path.read_bytes()[:-20000] + path.read_bytes()[-8000:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"--dataset_name .*parquet cannot be loaded: ") as error:
            open_source(path, tmp_path)
        assert "DatasetGenerationError" not in str(error.value)  # which does not say what is wrong


# --------------------------------------------------------------------------------------- image columns


def test_image_column_is_found_by_its_type(tmp_path):
    pixels = random_pixels(2)
    rows_of([encoded(p) for p in pixels], column="picture").save_to_disk(tmp_path / "saved")
    assert torch.equal(decode(open_source(tmp_path / "saved", tmp_path)), as_tensor(pixels))


def test_several_image_columns(tmp_path):
    front, back = random_pixels(2, seed=1), random_pixels(2, seed=2)
    rows = rows_of([encoded(p) for p in front], column="front")
    other = rows_of([encoded(p) for p in back], column="back").remove_columns("label")
    datasets.concatenate_datasets([rows, other], axis=1).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"\['front', 'back'\].*--image_column"):
        open_source(tmp_path / "saved", tmp_path)
    dataset = open_source(tmp_path / "saved", tmp_path, image_column="back")
    assert torch.equal(decode(dataset), as_tensor(back))


def test_wrong_image_column(tmp_path):
    source = write_source("parquet", tmp_path, [encoded(random_pixels(1)[0])])
    with pytest.raises(ValueError, match=r"--image_column img: .*no such column, but image: Image.*label: V"):
        open_source(source, tmp_path, image_column="img")
    with pytest.raises(ValueError, match=r"--image_column label holds no images, but .*int64"):
        open_source(source, tmp_path, image_column="label")


def test_column_of_raw_bytes_when_named(tmp_path):
    pixels = random_pixels(2)
    datasets.Dataset.from_dict({"png": [encoded(p) for p in pixels]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no image column, but png: Value\('binary'\)"):
        open_source(tmp_path / "saved", tmp_path)
    dataset = open_source(tmp_path / "saved", tmp_path, image_column="png")
    assert torch.equal(decode(dataset), as_tensor(pixels))


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_mode", "CMYK"), ("on_bad_image", "ignore"), ("resolution", 0)],
)
def test_wrong_options_name_their_flag(option, value):
    with pytest.raises(ValueError, match=rf"--{option} {value}"):
        open_images("digits", **{option: value})


# ---------------------------------------------------------------------------------------- colour modes


def one_pixel(mode, value):
    return Image.new(mode, (2, 2), value)


def sixteen_bits(values, mode):
    image = Image.new("I;16" if mode == "I;16" else mode, (len(values), 1))
    image.putdata(values)
    return image


def palette_image(alphas=None):
    """2x1: the first pixel red, the second blue, with the alphas given."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return encoded(image, transparency=bytes(alphas)) if alphas else encoded(image)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
# name: (file, mode after decoding, pixels of its first row)
COLOUR_MODES = {
    "1": (encoded(one_pixel("1", 1)), "L", [255, 255]),
    "L": (encoded(one_pixel("L", 37)), "L", [37, 37]),
    "L with a transparent level": (encoded(one_pixel("L", 37), transparency=37), "L", [255, 255]),
    "LA opaque": (encoded(one_pixel("LA", (37, 255))), "L", [37, 37]),
    "LA transparent": (encoded(one_pixel("LA", (37, 0))), "L", [255, 255]),
    "LA half": (encoded(one_pixel("LA", (0, 51))), "L", [204, 204]),  # 255 * (1 - 51/255)
    "RGB": (encoded(one_pixel("RGB", (1, 2, 3))), "RGB", [(1, 2, 3)] * 2),
    "RGB with a transparent colour": (
        encoded(one_pixel("RGB", (1, 2, 3)), transparency=(1, 2, 3)),
        "RGB",
        [WHITE] * 2,
    ),
    "RGBA opaque": (encoded(one_pixel("RGBA", (1, 2, 3, 255))), "RGB", [(1, 2, 3)] * 2),
    "RGBA transparent": (encoded(one_pixel("RGBA", (1, 2, 3, 0))), "RGB", [WHITE] * 2),
    "RGBA half": (encoded(one_pixel("RGBA", (0, 255, 0, 51))), "RGB", [(204, 255, 204)] * 2),
    "P": (palette_image(), "RGB", [RED, BLUE]),
    "P with transparency": (palette_image([255, 0]), "RGB", [RED, WHITE]),
    "GIF": (encoded(one_pixel("P", 0), "GIF", transparency=0), "RGB", [WHITE] * 2),
    "CMYK": (encoded(one_pixel("CMYK", (0, 255, 255, 0)), "TIFF"), "RGB", [RED] * 2),
    "I;16": (encoded(sixteen_bits([0, 257, 32768, 65535], "I;16")), "L", [0, 1, 128, 255]),
    "I;16 TIFF": (encoded(sixteen_bits([0, 65535], "I;16"), "TIFF"), "L", [0, 255]),
    "I;16B": (encoded(Image.frombytes("I;16B", (2, 1), b"\x01\x01\xff\xff"), "TIFF"), "L", [1, 255]),
    "I": (encoded(sixteen_bits([0, 257, 32768, 65535], "I"), "TIFF"), "L", [0, 1, 128, 255]),
    "F in 0..1": (encoded(sixteen_bits([0.0, 0.2, 1.0], "F"), "TIFF"), "L", [0, 51, 255]),
    "F in 0..255": (encoded(sixteen_bits([0.0, 51.4, 255.0], "F"), "TIFF"), "L", [0, 51, 255]),
}


@pytest.mark.parametrize("name", COLOUR_MODES)
def test_colour_modes(name):
    content, mode, expected = COLOUR_MODES[name]
    image = decode_image({"bytes": content, "path": None})
    assert image.mode == mode
    assert np.array_equal(np.asarray(image)[0], expected)


def test_the_files_have_the_modes_they_are_named_for():
    for name, (content, _, _) in COLOUR_MODES.items():
        mode = name.split()[0]
        assert Image.open(io.BytesIO(content)).mode == ("P" if mode == "GIF" else mode), name


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_levels_beyond_16_bits_are_bad_not_clipped(values):
    with pytest.raises(BadImage, match=r"outside 0\.\.65535"):
        decode_image({"bytes": encoded(sixteen_bits(values, "I"), "TIFF"), "path": None})


@pytest.mark.parametrize("values", [[float("nan"), 0.5], [-0.5, 0.5], [0.0, 300.0]])
def test_floats_that_are_no_grey_levels_are_bad(values):
    with pytest.raises(BadImage, match=r"outside"):
        decode_image({"bytes": encoded(sixteen_bits(values, "F"), "TIFF"), "path": None})


def test_bytes_count_and_not_the_path_they_once_had():
    entry = {"bytes": encoded(one_pixel("L", 37)), "path": "image.png"}
    assert decode_image(entry).getpixel((0, 0)) == 37


def test_exif_orientation():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned by 90 degrees clockwise
    image = decode_image({"bytes": encoded(pixels, exif=exif), "path": None})
    assert np.array_equal(np.asarray(image), np.rot90(pixels, -1))


def test_auto_mode_is_grey_only_if_all_are(tmp_path):
    grey, colour = encoded(random_pixels(1, channels=1)[0]), encoded(random_pixels(1)[0])
    assert open_contents(tmp_path, [grey] * 4, "saved").channels == 1
    mixed = open_contents(tmp_path, [grey, grey, grey, colour])
    assert mixed.channels == 3
    assert mixed[0].shape == (3, 8, 8)


def test_colour_image_after_a_grey_sample(tmp_path):
    grey, colour = encoded(random_pixels(1, channels=1)[0]), encoded(np.full((8, 8, 3), RED, np.uint8))
    contents = [grey] * 301
    contents[2] = colour  # the sample takes every fourth
    source = write_source("parquet", tmp_path, contents)
    dataset = open_source(source, tmp_path, on_bad_image="skip")  # but this is not a bad image
    assert dataset.channels == 1
    for look in LOOKS:
        with pytest.raises(ValueError, match=r"image 2 is in colour.*--image_mode RGB"):
            look(dataset, 2)
    assert open_source(source, tmp_path, image_mode="RGB")[2][:, 0, 0].tolist() == [255, 0, 0]
    assert open_source(source, tmp_path, image_mode="L")[2][:, 0, 0].tolist() == [76]  # 0.299 * 255


# ----------------------------------------------------------------------------------------------- sizes


def test_own_resolution_must_be_square(tmp_path):
    source = write_source("parquet", tmp_path, [encoded(np.zeros((4, 6), np.uint8))])
    with pytest.raises(ValueError, match=r"6x4, not square: pass --resolution"):
        open_source(source, tmp_path)
    assert open_source(source, tmp_path, resolution=4)[0].shape == (1, 4, 4)


def test_resize_and_centre_crop(tmp_path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200  # only the centre is kept
    tall = np.zeros((24, 8), np.uint8)
    tall[4:20] = 100  # as here, and halved; the filter reaches a little beyond the centre
    dataset = open_contents(tmp_path, [encoded(wide), encoded(tall)], resolution=4)
    images = decode(dataset)
    assert (images[0] == 200).all()
    assert (images[1] == 100).all()


# ------------------------------------------------------------------------------------------ bad images


@pytest.mark.parametrize("kind", BAD_BYTES)
def test_bad_bytes_are_bad_images(kind, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(bad_bytes(kind))
    with pytest.raises(BadImage):
        decode_image({"bytes": bad_bytes(kind), "path": None})
    with pytest.raises(BadImage, match=str(path)):
        decode_image({"bytes": None, "path": str(path)})


def test_entries_without_an_image_are_bad_images():
    for entry in (None, {"bytes": None, "path": None}):
        with pytest.raises(BadImage, match=r"holds no image"):
            decode_image(entry)
    with pytest.raises(BadImage, match=r"/no/such\.png: FileNotFoundError"):
        decode_image({"bytes": None, "path": "/no/such.png"})


def test_decompression_bomb_is_a_bad_image(monkeypatch):
    entry = {"bytes": encoded(random_pixels(1)[0]), "path": None}
    decode_image(entry)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # Pillow refuses more than twice as many
    with pytest.raises(BadImage, match=r"DecompressionBombError"):
        decode_image(entry)


def contents_with_bad_ones(num_images, bad):
    """File contents, bad in several ways at the indices `bad`; and the pixels of all, had they been good."""
    pixels = random_pixels(num_images)
    contents = [encoded(p) for p in pixels]
    for i, kind in zip(bad, itertools.cycle(BAD_BYTES), strict=False):
        contents[i] = bad_bytes(kind)
    return contents, as_tensor(pixels)


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_bad_images_are_errors(kind, tmp_path):
    bad = list(range(1, 31, 2))
    dataset = open_contents(tmp_path, contents_with_bad_ones(40, bad)[0], kind)
    first_ten = r"15 image\(s\), index 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, \.\.\.; the first: .*"
    with pytest.raises(ValueError, match=first_ten + "--on_bad_image skip"):
        decode(dataset)
    with pytest.raises(ValueError, match=r"index 3;.*--on_bad_image skip"):
        dataset[3]
    with pytest.raises(ValueError, match=r"cannot decode 1 image\(s\), index \d+;"):
        batches(dataset, 10, placement="stream")
    assert dataset[2].shape == (3, 8, 8)
    assert dataset.bad_images == []


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_bad_images_are_left_out(kind, tmp_path, caplog):
    bad = [0, 1, 6, 9]  # the first of all, two in a row, and the last of all
    contents, pixels = contents_with_bad_ones(10, bad)
    dataset = open_contents(tmp_path, contents, kind, on_bad_image="skip")
    assert dataset.resolution == 8
    assert torch.equal(decode(dataset), pixels[[2, 3, 4, 5, 7, 8]])
    assert dataset.bad_images == bad
    assert "cannot decode 4 image(s), index 0, 1, 6, 9" in caplog.text


def test_next_good_image_stands_in(tmp_path):
    contents, pixels = contents_with_bad_ones(10, [0, 1, 6, 9])
    dataset = open_contents(tmp_path, contents, on_bad_image="skip")
    seen = torch.stack([dataset[i] for i in range(10)])
    assert torch.equal(seen, pixels[[2, 2, 2, 3, 4, 5, 7, 7, 8, 2]])  # 9 goes round, past 0 and 1
    assert dataset.bad_images == [0, 1, 6, 9]


def test_missing_rows_are_left_out(tmp_path):
    pixels = random_pixels(3)
    contents = [None, encoded(pixels[1]), None]
    dataset = open_contents(tmp_path, contents, "saved", on_bad_image="skip")
    assert torch.equal(decode(dataset), as_tensor(pixels[1:2]))
    assert dataset.bad_images == [0, 2]


def test_bad_first_image_is_an_error_when_its_size_is_needed(tmp_path):
    source = write_source("parquet", tmp_path, contents_with_bad_ones(3, [0])[0])
    with pytest.raises(ValueError, match=r"index 0;.*--on_bad_image skip"):
        open_source(source, tmp_path)
    assert open_source(source, tmp_path, resolution=8)[1].shape == (3, 8, 8)


def test_only_bad_images(tmp_path):
    source = write_source("parquet", tmp_path, [b""] * 3)
    with pytest.raises(ValueError, match=r"none of the 3 images"):
        open_source(source, tmp_path, on_bad_image="skip")
    dataset = open_source(source, tmp_path, on_bad_image="skip", resolution=8)
    assert dataset.channels == 3  # nothing shows that they are grey
    for look in LOOKS:
        with pytest.raises(ValueError, match=r"no image is left"):
            look(dataset, 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_counts_what_it_skips(num_workers, tmp_path):
    contents, pixels = contents_with_bad_ones(10, [1, 6])
    dataset = open_contents(tmp_path, contents, on_bad_image="skip")
    options = {"seed": 0, "placement": "stream", "num_workers": num_workers}
    images = training_batches(dataset, 5, **options)
    seen = torch.cat([next(images) for _ in range(4)])  # two epochs: each bad image twice, yet counted once
    stand_in = torch.tensor([0, 2, 2, 3, 4, 5, 7, 7, 8, 9])
    assert torch.equal(seen, pixels[stand_in[image_order(10, 0, 0, 20)]])
    assert (images.num_images, images.skipped, dataset.bad_images) == (10, 2, [1, 6])


@pytest.mark.parametrize("placement", ["memory", "device"])
def test_skipped_images_are_never_drawn(placement, tmp_path):
    contents, pixels = contents_with_bad_ones(10, [1, 6])
    dataset = open_contents(tmp_path, contents, on_bad_image="skip")
    images = training_batches(dataset, 4, seed=0, placement=placement, show_progress=False)
    assert (images.num_images, images.skipped) == (8, 2)
    seen = torch.cat([next(images) for _ in range(2)])
    assert torch.equal(seen, pixels[[0, 2, 3, 4, 5, 7, 8, 9]][image_order(8, 0, 0, 8)])


# ----------------------------------------------------------------------------------------------- order


def test_every_image_once_in_every_epoch():
    epochs = image_order(10, seed=3, first=0, count=50).view(5, 10)
    assert torch.equal(epochs.sort().values, torch.arange(10).expand(5, 10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5


def test_order_depends_on_nothing_but_the_number_of_the_image():
    whole = image_order(7, seed=0, first=0, count=40)
    for first, count in [(0, 0), (0, 7), (3, 4), (5, 20), (7, 7), (13, 2), (39, 1)]:
        part = image_order(7, seed=0, first=first, count=count)
        assert part.dtype == torch.int64
        assert torch.equal(part, whole[first : first + count])


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        tuple(image_order(50, seed, epoch * 50, 50).tolist())
        for seed in [*range(8), 2**31, 2**31 + 1]
        for epoch in range(8)
    }
    assert len(orders) == 80


def test_seeds_do_not_collide():
    seeds = range(1000)  # with 1e6 epochs each, if all are further apart than that
    mixed = sorted(image_data._epoch_seed(seed, 0) for seed in seeds)
    gaps = [b - a for a, b in itertools.pairwise([*mixed, mixed[0] + 2**32])]
    assert min(gaps) > 1_000_000
    assert image_data._epoch_seed(5, 7) - image_data._epoch_seed(5, 0) == 7


def test_manual_seed_ignores_the_upper_bits():
    """Why `_epoch_seed` mixes into 32 bits. Should this fail one day, it may use 64."""
    low, high = (torch.randperm(100, generator=torch.Generator().manual_seed(s)) for s in (1, 1 + 2**32))
    assert torch.equal(low, high)


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
def test_batches_are_the_images_in_order(placement, digits):
    images = decode(digits)
    seen = batches(digits, 20, batch_size=100, placement=placement, seed=5)  # crosses an epoch: 2000 > 1797
    assert seen.dtype == torch.uint8
    assert torch.equal(seen.flatten(0, 1), images[image_order(1797, 5, 0, 2000)])


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
@pytest.mark.parametrize("num_images", [3, 8, 23])  # a step takes 8
def test_ranks_see_what_one_process_sees(num_images, placement, tmp_path):
    dataset = open_contents(tmp_path, [encoded(p) for p in random_pixels(num_images)])
    alone = batches(dataset, 7, batch_size=8, placement=placement)
    ranks = [batches(dataset, 7, batch_size=4, placement=placement, rank=r, world_size=2) for r in (0, 1)]
    assert torch.equal(ranks[0], alone[:, 0::2])
    assert torch.equal(ranks[1], alone[:, 1::2])


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_resuming_continues_the_run(steps, placement, tmp_path):
    dataset = open_contents(tmp_path, [encoded(p) for p in random_pixels(23)])
    share = {"placement": placement, "rank": 1, "world_size": 2}
    whole = batches(dataset, 12, **share)
    resumed = batches(dataset, 12 - steps, first_image=steps * 2 * 4, **share)
    assert torch.equal(resumed, whole[steps:])


def test_stream_with_workers_gives_the_same_batches(digits):
    seen = batches(digits, 20, batch_size=100, placement="stream", num_workers=2)
    assert torch.equal(seen, batches(digits, 20, batch_size=100))


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
def test_batches_do_not_touch_the_global_generator(placement, digits):
    before = torch.random.get_rng_state()
    batches(digits, 2, placement=placement)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("placement", ["memory", "device"])
def test_writing_to_a_batch_leaves_the_images_alone(placement, digits):
    images = training_batches(digits, 1797, seed=0, placement=placement, show_progress=False)
    first = next(images).clone()
    next(images).zero_()
    third = next(images)
    assert third.sum() == first.sum()


# ------------------------------------------------------------------------------------------- placement


def available(monkeypatch, nbytes):
    memory = types.SimpleNamespace(available=nbytes)
    monkeypatch.setattr(image_data.psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize(
    ("host_nbytes", "processes", "expected"), [(201, 1, "memory"), (200, 1, "stream"), (399, 2, "stream")]
)
def test_auto_placement_leaves_half_of_the_memory(host_nbytes, processes, expected, monkeypatch):
    available(monkeypatch, host_nbytes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert image_data._placement_that_fits(100, torch.device("cpu")) == expected


@pytest.mark.parametrize(("gpu_nbytes", "expected"), [(401, "device"), (400, "memory")])
def test_auto_placement_leaves_most_of_the_gpu(gpu_nbytes, expected, monkeypatch):
    available(monkeypatch, 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu_nbytes, 10**9))
    assert image_data._placement_that_fits(100, torch.device("cuda", 0)) == expected


def test_auto_placement_is_used(digits, monkeypatch):
    images = training_batches(digits, 4, seed=0, show_progress=False)
    assert (images.placement, images.num_images, images.skipped) == ("memory", 1797, 0)
    available(monkeypatch, digits.nbytes)
    streamed = training_batches(digits, 4, seed=0)
    assert streamed.placement == "stream"
    assert torch.equal(next(streamed), next(images))


def test_unknown_placement_and_rank(digits):
    with pytest.raises(ValueError, match=r"--data_placement disk"):
        training_batches(digits, 4, seed=0, placement="disk")
    with pytest.raises(ValueError, match=r"rank 2"):
        training_batches(digits, 4, seed=0, rank=2, world_size=2)


def test_progress_bar(digits, capsys):
    digits.decode_all(show_progress=False)
    assert capsys.readouterr().err == ""
    digits.decode_all(show_progress=True)
    assert "Decoding digits: 100%" in capsys.readouterr().err


@needs_cuda
@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
def test_no_synchronisation_with_the_gpu(placement, digits):
    expected = batches(digits, 20, batch_size=100)
    images = training_batches(digits, 100, seed=0, placement=placement, device="cuda", show_progress=False)
    seen = [next(images)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen += [next(images) for _ in range(19)]
        normalize(seen[0], torch.ones(100, dtype=torch.bool, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen[0].is_cuda
    assert torch.equal(torch.stack(seen).cpu(), expected)


# ------------------------------------------------------------------------------------------- normalize


def test_normalize():
    images = torch.tensor([0, 51, 127, 128, 204, 255], dtype=torch.uint8).view(1, 1, 2, 3)
    expected = torch.tensor([-1, -0.6, 127 / 127.5 - 1, 128 / 127.5 - 1, 0.6, 1]).view(1, 1, 2, 3)
    normalized = normalize(images)
    assert normalized.dtype == torch.float32
    assert torch.allclose(normalized, expected, rtol=0, atol=1e-7)
    assert (normalized.min(), normalized.max()) == (-1, 1)


def test_normalize_flips_the_chosen_images_left_to_right():
    images = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).view(2, 3, 2, 4)
    flipped = normalize(images, torch.tensor([False, True]))
    assert torch.equal(flipped[0], normalize(images)[0])
    assert torch.equal(flipped[1], normalize(images)[1, :, :, [3, 2, 1, 0]])
    assert images.flatten().equal(torch.arange(48, dtype=torch.uint8))  # its argument is left alone
