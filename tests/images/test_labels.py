"""Labels: found by their type or by name, kept beside their images whatever the order, the placement or the split."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from image_helpers import contents_with_bad_ones, encoded, open_source, random_pixels, rows_of, write_folder
from sklearn.datasets import load_digits

from images import open_images, training_batches


def labelled_rows(labels, names):
    """Image i has grey level i everywhere, and label `labels[i]`."""
    pixels = [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(len(labels))]
    rows = rows_of([encoded(p) for p in pixels]).remove_columns("label")
    return rows.add_column("label", labels).cast_column("label", datasets.ClassLabel(names=names))


@pytest.fixture
def cats_and_dogs(tmp_path):
    labels = [i * i % 3 % 2 for i in range(20)]
    labelled_rows(labels, ["cat", "dog"]).save_to_disk(tmp_path / "saved")
    return open_source(tmp_path / "saved", tmp_path), torch.tensor(labels)


# Where they come from


def test_of_the_digits(digits):
    assert digits.classes == list("0123456789")
    assert np.array_equal(digits.labels().numpy(), load_digits().target)


def test_of_a_column_by_its_type(cats_and_dogs):
    dataset, labels = cats_and_dogs
    assert dataset.classes == ["cat", "dog"]
    assert torch.equal(dataset.labels(), labels)


def test_of_class_folders(tmp_path):
    for name, count in (("b", 2), ("a", 1), ("c", 3)):
        write_folder(tmp_path / "data" / name, [encoded(p) for p in random_pixels(count)])
    dataset = open_images(str(tmp_path / "data"))
    assert dataset.classes == ["a", "b", "c"]
    assert dataset.labels().tolist() == [0, 1, 1, 2, 2, 2]


def test_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", random_pixels(4), np.array([2, 0, 1, 2]))
    dataset = open_images(str(tmp_path / "a.npz"), split="train[1:]")
    assert dataset.classes == ["0", "1", "2"]
    assert dataset.labels().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [(["dog", "ant", "dog"], ["ant", "dog"], [1, 0, 1]), ([7, 10, 7], ["7", "10"], [0, 1, 0])],
)
def test_of_a_chosen_column_of_strings_or_numbers(values, names, labels, tmp_path):
    rows = rows_of([encoded(p) for p in random_pixels(3)]).add_column("kind", values)
    rows.save_to_disk(tmp_path / "saved")
    dataset = open_source(tmp_path / "saved", tmp_path, label_column="kind")
    assert dataset.classes == names
    assert dataset.labels().tolist() == labels


# What is wrong with them


def test_without_labels(tmp_path):
    write_folder(tmp_path / "data", [encoded(p) for p in random_pixels(2)])
    with pytest.raises(ValueError, match="data has no labels: neither a column of them"):
        open_images(str(tmp_path / "data")).labels()


def test_of_several_columns_one_is_chosen(tmp_path):
    rows = labelled_rows([0, 1], ["cat", "dog"])
    rows = rows.add_column("fine", [1, 0]).cast_column("fine", datasets.ClassLabel(names=["x", "y"]))
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has label columns \['label', 'fine'\]: choose one by --label_column"):
        open_source(tmp_path / "saved", tmp_path).labels()
    assert open_source(tmp_path / "saved", tmp_path, label_column="fine").labels().tolist() == [1, 0]


def test_an_image_without_a_label(tmp_path):
    labelled_rows([0, -1], ["cat", "dog"]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="image 1 has no label"):
        open_source(tmp_path / "saved", tmp_path).labels()


def test_a_class_without_an_image(tmp_path):
    write_folder(tmp_path / "data" / "cat", [encoded(p) for p in random_pixels(2)])
    (tmp_path / "data" / "dog").mkdir()
    dataset = open_images(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="no image of class dog"):
        dataset.labels()


@pytest.mark.parametrize(
    ("column", "message"), [("kind", "has no such column, but image, label"), ("image", "holds no labels")]
)
def test_a_column_that_is_none(column, message, tmp_path):
    rows_of([encoded(p) for p in random_pixels(2)]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"--label_column {column}.*{message}"):
        open_source(tmp_path / "saved", tmp_path, label_column=column)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.array([0.5, 1.0]), r"arr_1 is float64 \[2\], and not of whole numbers \[2\]"),
        (np.array([0, 1, 2]), r"arr_1 is int64 \[3\], and not of whole numbers \[2\]"),
        (np.array([-1, 0]), r"arr_1 has numbers from -1 to 0, and not in \[0, 100000\)"),
        (np.array([0, 2**40]), "arr_1 has numbers from 0 to 1099511627776"),
    ],
)
def test_an_npz_with_other_numbers_has_images_and_no_labels(labels, problem, tmp_path):
    np.savez(tmp_path / "a.npz", random_pixels(2), labels)
    dataset = open_images(str(tmp_path / "a.npz"))
    assert (len(dataset), dataset.classes) == (2, None)
    with pytest.raises(ValueError, match=f"has no labels: {problem}"):
        dataset.labels()


def test_of_another_split_they_are_those_of_the_first(tmp_path):
    """A split may lack classes, whose names are then numbered otherwise in it."""
    for split, classes in (("train", "abc"), ("test", "ac"), ("validation", "ad")):
        for name in classes:
            write_folder(tmp_path / split / name, [encoded(p) for p in random_pixels(1)])
    train, test, other = (open_images(str(tmp_path), split=split) for split in ("train", "test", "validation"))
    assert test.labels().tolist() == [0, 1]
    assert test.labels(train.classes).tolist() == [0, 2]
    with pytest.raises(ValueError, match="the class 'd' is not one of a, b, c"):
        other.labels(train.classes)


# Beside their images


def labelled_batches(dataset, labels, count, **options):
    batches = training_batches(dataset, 4, seed=0, labels=labels, show_progress=False, **options)
    images, labels = zip(*itertools.islice(batches, count), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(
    "options",
    [{"placement": "memory"}, {"placement": "device"}, {"placement": "stream"}]
    + [{"placement": "stream", "num_workers": 1}, {"placement": "memory", "rank": 1, "world_size": 2}],
)
def test_batches_carry_them(options, cats_and_dogs):
    dataset, labels = cats_and_dogs
    images, found = labelled_batches(dataset, labels, 11, **options)
    assert torch.equal(found, labels[images[:, 0, 0, 0].long()])
    assert len(set(found.tolist())) == 2


@pytest.mark.parametrize("placement", ["memory", "stream"])
def test_an_image_that_stands_in_for_a_bad_one_brings_its_own(placement, tmp_path):
    contents, pixels = contents_with_bad_ones(12, [2, 3, 11])
    rows_of(contents).save_to_disk(tmp_path / "saved")
    dataset = open_source(tmp_path / "saved", tmp_path, on_bad_image="skip", resolution=8, image_mode="RGB")
    images, found = labelled_batches(dataset, torch.arange(12), 9, placement=placement)
    assert torch.equal(images, pixels[found])
    assert set(found.tolist()) == set(range(12)) - {2, 3, 11}


def test_an_image_that_could_not_be_read_for_a_while_shifts_none(tmp_path):
    folder = write_folder(tmp_path / "data", [encoded(p) for p in random_pixels(6)])
    dataset = open_images(str(folder), on_bad_image="skip")
    (folder / "0001.png").rename(tmp_path / "away")
    dataset[1]  # the next one stands in
    (tmp_path / "away").rename(folder / "0001.png")
    assert dataset.bad_images == [1]
    images, found = labelled_batches(dataset, torch.arange(6), 6, placement="memory")
    assert torch.equal(images, dataset.decode_all(show_progress=False)[found])
    assert set(found.tolist()) == set(range(6))


def test_a_held_out_part_keeps_them(cats_and_dogs):
    dataset, labels = cats_and_dogs
    for part in dataset.hold_out(0.25):
        numbers = part.decode_all(show_progress=False)[:, 0, 0, 0].long()
        assert torch.equal(part.labels(), labels[numbers])
        assert part.classes == dataset.classes
