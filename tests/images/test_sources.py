"""Every image source gives the very pixels; those that are wrong are named in one line."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_helpers import (
    as_tensor,
    decode,
    encoded,
    open_contents,
    open_source,
    random_pixels,
    rows_of,
    write_folder,
    write_source,
)
from sklearn.datasets import load_digits

from images import open_images

CIFAR10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"no CIFAR-10 in {CIFAR10}")

SOURCES = ["images", "splits", "parquet", "parquet_file", "saved", "saved_splits"]


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


@pytest.mark.parametrize("kind", [*SOURCES, "npz"])
def test_slices_of_every_source(kind, tmp_path):
    pixels = random_pixels(10)
    if kind == "npz":
        source = tmp_path / "images.npz"
        np.savez(source, pixels)
    else:
        source = write_source(kind, tmp_path, [encoded(p) for p in pixels])
    for split, expected in [("train[1:3]", pixels[1:3]), ("train[50%:80%]", pixels[5:8]), ("train[-2:]", pixels[8:])]:
        assert torch.equal(decode(open_source(source, tmp_path, split=split)), as_tensor(expected))


def test_slices_of_the_digits(digits):
    assert torch.equal(decode(open_images("digits", split="train[:3]+train[5:6]")), decode(digits)[[0, 1, 2, 5]])
    with pytest.raises(ValueError, match=r"--dataset_name digits: the split 'train\[' cannot be understood"):
        open_images("digits", split="train[")


@pytest.mark.parametrize("channels", [1, 3])
def test_npz(channels, tmp_path):
    pixels = random_pixels(5, channels=channels)
    np.savez(tmp_path / "images.npz", pixels.reshape(5, 8, 8, channels))
    dataset = open_source(tmp_path / "images.npz", tmp_path)
    assert (dataset.channels, dataset.resolution, len(dataset)) == (channels, 8, 5)
    assert torch.equal(decode(dataset), as_tensor(pixels))
    assert torch.equal(dataset[-1], as_tensor(pixels)[-1])


def test_a_folder_named_like_the_digits(tmp_path, monkeypatch):
    write_folder(tmp_path / "digits", [encoded(p) for p in random_pixels(2)])
    monkeypatch.chdir(tmp_path)
    shadowed = open_images("digits", split="train[:5]")
    assert len(shadowed) == 5
    assert "./digits means the folder" in shadowed.contents()["notes"][0]
    assert open_images("./digits").contents()["notes"] == []
    assert len(open_images("./digits")) == 2


def test_classes_of_a_data_set_are_known(tmp_path):
    rows = rows_of([encoded(p) for p in random_pixels(2)])
    rows.cast_column("label", datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(tmp_path / "saved")
    assert open_source(tmp_path / "saved", tmp_path).contents()["classes"] == ["cat", "dog"]


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
