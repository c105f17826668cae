"""Every image in a local folder is used, and whatever is not is counted; metadata, splits, classes, our own folders."""

import json
import os
import time

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from image_helpers import encoded, open_source, random_pixels, write_folder, write_parquet
from PIL import Image

from images import BadImage
from images.folders import check_output_outside_data, list_folder
from images.sources import open_source as open_rows

PNG = encoded(random_pixels(1)[0])


def write(root, *names, content=PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def used(root, **options):
    """Paths of the images that a source has, in its order, relative to the folder."""
    return [os.path.relpath(entry["path"], root) for entry in open_rows(str(root), **options).images]


def generated(folder, num_images, status="complete", image_format="png"):
    """A folder as generate.py leaves it."""
    write_folder(folder / "images", [PNG] * num_images)
    Image.new("RGB", (64, 64)).save(folder / "grid.png")
    record = {"status": status, "num_images": num_images, "settings": {"format": image_format}}
    (folder / "generation.json").write_text(json.dumps(record))
    return folder


# ----------------------------------------------------------------------------------------------- what is an image


def test_names_do_not_decide_which_images_are_used(tmp_path):
    names = ["photo of a train.png", "a.Png", "b.PNG", "c.avif", "d", "e.bak", "Straße.jpg", "with space.JPEG", "1.2"]
    write(tmp_path, *names)
    assert used(tmp_path) == sorted(names)


@pytest.mark.parametrize("name", ["a.heic", "a.jxl", "a.SVG", "a.cr2"])
def test_images_that_pillow_cannot_read_are_bad_images_and_not_dropped(name, tmp_path):
    write(tmp_path, "b.png")
    write(tmp_path, name, content=b"not for Pillow")
    with pytest.raises(BadImage, match=r"index 0"):
        open_source(tmp_path, tmp_path, resolution=8).decode_all(show_progress=False)
    dataset = open_source(tmp_path, tmp_path, on_bad_image="skip")
    assert len(dataset.decode_all(show_progress=False)) == 1
    assert dataset.contents()["images"] == 1
    assert dataset.contents()["left_out"] == {"unreadable image": 1}


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    write(tmp_path, "a.png", "b/c.png")
    write(tmp_path, "a.txt", "b/c.TXT", "a.json", "LICENSE", "odd.xyz", "thumbs.db", content=b"text")
    write(tmp_path, "images.zip", content=b"PK")
    write(tmp_path, ".DS_Store", ".cache/x.png", content=b"")
    os.mkfifo(tmp_path / "pipe.png")
    contents = open_source(tmp_path, tmp_path).contents()
    expected = {".txt": 2, ".json": 1, "file without an extension": 1, ".xyz": 1, ".db": 1, ".zip": 1}
    assert contents["left_out"] == {**expected, "hidden file": 1, "hidden folder": 1, "special file": 1}
    assert (contents["images"], contents["files"]) == (2, 11)


def test_captions_beside_images(tmp_path):
    write(tmp_path, "a.png", "b.png")
    write(tmp_path, "a.txt", "b.txt", content=b"a caption")
    dataset = open_source(tmp_path, tmp_path)
    assert len(dataset) == 2
    assert dataset.describe() == f"2 images of 4 files in {tmp_path}/ (8x8); left out: 2 .txt"


def test_a_folder_with_the_name_of_an_image(tmp_path):
    write(tmp_path, "x.png/a.png", "x.png/b.png")
    assert used(tmp_path) == ["x.png/a.png", "x.png/b.png"]


def test_links_are_followed_but_into_no_circle(tmp_path):
    write(tmp_path / "elsewhere", "a/1.png", "b/2.png")
    data = tmp_path / "data"
    data.mkdir()
    for name in "ab":
        (data / name).symlink_to(tmp_path / "elsewhere" / name)
    (data / "c").mkdir()
    (data / "c" / "3.png").symlink_to(tmp_path / "elsewhere" / "a" / "1.png")
    (data / "c" / "up").symlink_to(data)
    (data / "c" / "self").symlink_to("self")
    source = open_rows(str(data))
    assert used(data) == ["a/1.png", "b/2.png", "c/3.png"]
    assert source.classes == ["a", "b", "c"]
    assert source.left_out == {"link to a folder around it": 1, "broken link": 1}


def test_broken_links_to_images_are_bad_images(tmp_path):
    write(tmp_path, "b.png")
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(BadImage, match=r"a\.png: FileNotFoundError"):
        open_source(tmp_path, tmp_path, resolution=8).decode_all(show_progress=False)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a/1.png", "b/2.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, to whom nothing is forbidden
    with pytest.raises(ValueError, match=r"--dataset_name.*/b cannot be read: Permission denied"):
        open_rows(str(tmp_path))


def test_file_names_that_are_not_utf8_are_named(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(PNG)
    with pytest.raises(ValueError, match=r"udcff\.png' is not UTF-8"):
        open_rows(str(tmp_path))


def test_thousands_of_images_are_listed_without_being_opened(tmp_path, monkeypatch):
    for i in range(3000):
        (tmp_path / f"{i}.png").touch()
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
    start = time.perf_counter()
    assert len(list_folder(tmp_path).images) == 3000
    assert time.perf_counter() - start < 2


def test_a_folder_is_found_by_any_way_to_write_it(tmp_path, monkeypatch):
    write(tmp_path / "my photos", "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my photos", "./my photos/", f"{tmp_path}/my photos//", "~/my photos"):
        assert len(open_source(name, tmp_path)) == 1


# ---------------------------------------------------------------------------------------- order, classes and splits


def test_the_order_and_the_classes_are_those_of_datasets(tmp_path):
    data = tmp_path / "data"
    write(data, "B/4.jpg", "a b/1.png", "a-c/10.png", "a-c/2.png", "a/3.png", "é/5.png", "_u/7.png")
    options = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    theirs = datasets.load_dataset("imagefolder", data_dir=str(data), **options)
    ours = open_rows(str(data)).rows
    assert ours.features["label"] == theirs.features["label"]
    assert ours["label"] == theirs["label"]
    undecoded = theirs.cast_column("image", datasets.Image(decode=False))
    assert [e["path"] for e in ours["image"]] == [e["path"] for e in undecoded["image"]]


def test_the_order_of_nested_folders_is_that_of_datasets(tmp_path):
    data = tmp_path / "data"
    write(data, "z.png", "a/x.png", "a/x/2.png", "a/3.png", "a.b/4.png", "A.JPG", "a b.png")
    options = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    theirs = datasets.load_dataset("imagefolder", data_dir=str(data), **options)
    undecoded = theirs.cast_column("image", datasets.Image(decode=False))
    assert used(data) == [os.path.relpath(entry["path"], data) for entry in undecoded["image"]]


def test_class_folders_are_classes_even_if_one_is_called_train(tmp_path):
    for name in ("bicycle", "car", "train"):
        write(tmp_path, *(f"{name}/{i}.png" for i in range(6)))
    (tmp_path / "empty").mkdir()
    dataset = open_source(tmp_path, tmp_path)
    contents = dataset.contents()
    assert len(dataset) == 18
    assert contents["classes"] == ["bicycle", "car", "train"]
    assert contents["notes"] == ["no class for empty: no image in a folder of that name"]
    assert "18 images of 18 files" in dataset.describe()
    assert "3 classes: bicycle, car, train; 8x8" in dataset.describe()
    assert open_rows(str(tmp_path)).rows["label"] == [0] * 6 + [1] * 6 + [2] * 6


def test_nested_class_folders_count_by_the_first_level(tmp_path):
    write(tmp_path, "cat/old/1.png", "cat/2.png", "dog/3.png")
    assert open_rows(str(tmp_path)).classes == ["cat", "dog"]
    write(tmp_path, "beside.png")
    assert open_rows(str(tmp_path)).classes is None
    assert len(open_rows(str(tmp_path)).images) == 4


@pytest.mark.parametrize(
    ("train", "test", "asked"),
    [("train", "test", "test"), ("training", "val", "validation"), ("Train", "eval", "test"),
     ("train2017", "val2017", "validation"), ("images/train", "images/valid", "validation")],
)  # fmt: skip
def test_split_folders(train, test, asked, tmp_path):
    write(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/a/3.png")
    source = open_rows(str(tmp_path))
    assert used(tmp_path) == [f"{train}/a/1.png", f"{train}/b/2.png"]
    assert source.classes == ["a", "b"]
    assert source.left_out == {f"image of split {asked}": 1}
    assert used(tmp_path, split=asked) == [f"{test}/a/3.png"]
    assert len(used(tmp_path, split=f"train+{asked}")) == 3


def test_folders_that_only_sound_like_splits_are_classes(tmp_path):
    write(tmp_path, "train station/1.png", "test tube/2.png")
    assert open_rows(str(tmp_path)).classes == ["test tube", "train station"]


def test_images_beside_split_folders_are_left_out_aloud(tmp_path):
    write(tmp_path, "train/1.png", "test/2.png", "logo.png")
    source = open_rows(str(tmp_path))
    assert len(source.images) == 1
    assert source.left_out == {"image of split test": 1, "image beside the splits": 1}
    assert "1 image lies beside the folders of the splits" in source.notes[0]


def test_slices_of_a_folder(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(10)))
    assert used(tmp_path, split="train[:3]") == ["0.png", "1.png", "2.png"]
    assert used(tmp_path, split="train[50%:70%]") == ["5.png", "6.png"]
    assert open_rows(str(tmp_path), split="train[:3]").left_out == {"image outside train[:3]": 7}
    with pytest.raises(ValueError, match=r"holds no images, of 10"):
        open_rows(str(tmp_path), split="train[5:5]")


# ------------------------------------------------------------------------------------------------------- metadata


def write_metadata(path, names):
    rows = [{"file_name": name, "text": "a, b"} for name in names]
    if path.suffix == ".csv":
        path.write_text("file_name,text\n" + "".join(f'{name},"a, b"\n' for name in names))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("extension", ["csv", "jsonl", "parquet"])
def test_metadata_chooses_and_its_omissions_are_counted(extension, tmp_path, caplog):
    data = write(tmp_path / "data", *(f"{i}.png" for i in range(5)))
    write_metadata(data / f"metadata.{extension}", ["4.png", "0.png", "2.png"])
    options = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    theirs = datasets.load_dataset("imagefolder", data_dir=str(data), **options)
    undecoded = theirs.cast_column("image", datasets.Image(decode=False))
    assert used(data) == ["4.png", "0.png", "2.png"] == [os.path.basename(e["path"]) for e in undecoded["image"]]
    dataset = open_source(data, tmp_path)
    assert f"2 images are not in metadata.{extension}, and left out" in caplog.text
    assert dataset.contents()["left_out"] == {f"image not in metadata.{extension}": 2}
    assert dataset.contents()["files"] == 6


def test_metadata_speaks_for_its_own_folder(tmp_path):
    write(tmp_path, "train/1.png", "train/sub/2.png", "train/3.png", "test/4.png", "test/5.png")
    write_metadata(tmp_path / "train" / "metadata.csv", ["sub/2.png", "1.png"])
    assert used(tmp_path) == ["train/sub/2.png", "train/1.png"]
    assert used(tmp_path, split="test") == ["test/4.png", "test/5.png"]
    assert open_rows(str(tmp_path)).left_out["image not in train/metadata.csv"] == 1


def test_a_listed_file_that_is_absent_is_named(tmp_path):
    write(tmp_path, "0.png")
    write_metadata(tmp_path / "metadata.csv", ["0.png", "gone.png"])
    with pytest.raises(ValueError, match=r"metadata\.csv lists 'gone\.png', which is not there"):
        open_rows(str(tmp_path))
    write_metadata(tmp_path / "metadata.csv", ["../0.png"])
    with pytest.raises(ValueError, match=r"lists '\.\./0\.png'"):
        open_rows(str(tmp_path))


def test_metadata_without_file_names_is_announced(tmp_path):
    write(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text("name,text\n0.png,a\n")
    source = open_rows(str(tmp_path))
    assert len(source.images) == 1
    assert source.notes == ["metadata.csv has no column file_name, and is not used"]
    assert source.left_out == {".csv": 1}


def test_metadata_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "0.png")
    (tmp_path / "metadata.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl cannot be read: JSONDecodeError"):
        open_rows(str(tmp_path))
    write_metadata(tmp_path / "metadata.csv", ["0.png"])
    with pytest.raises(ValueError, match=r"has metadata.csv and metadata.jsonl: keep one"):
        open_rows(str(tmp_path))


# ------------------------------------------------------------------------------- folders of other kinds, and our own


def test_images_and_data_files_together_are_refused(tmp_path):
    write(tmp_path, "banner.png")
    write_parquet(tmp_path, [PNG])
    with pytest.raises(ValueError, match=r"images \(banner\.png\) and data files \(train-.*\.parquet\): name one"):
        open_rows(str(tmp_path))


def test_archives_are_to_be_unpacked(tmp_path):
    write(tmp_path, "images.zip", content=b"PK")
    with pytest.raises(ValueError, match=r"holds archives only \(1 \.zip\): unpack"):
        open_rows(str(tmp_path))


def test_a_folder_of_images_has_no_configurations(tmp_path):
    write(tmp_path, "0.png")
    with pytest.raises(ValueError, match=r"--dataset_config_name x: a folder of images has no"):
        open_rows(str(tmp_path), config_name="x")


def test_the_grid_of_generate_is_no_image(tmp_path):
    dataset = open_source(generated(tmp_path / "generated", 3), tmp_path)
    assert (len(dataset), dataset.resolution) == (3, 8)
    write(tmp_path / "data", "photos/0.png")
    generated(tmp_path / "data" / "more", 2)
    inside = open_source(tmp_path / "data", tmp_path)
    assert (len(inside), inside.resolution) == (3, 8)
    assert inside.contents()["left_out"] == {".json": 1, "grid.png of generate.py": 1}


def test_images_of_generate_in_an_npz_inside_a_folder_are_announced(tmp_path):
    write(tmp_path, "0.png")
    folder = generated(tmp_path / "more", 0, image_format="npz")
    np.savez(folder / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    source = open_rows(str(tmp_path))
    assert len(source.images) == 1
    assert source.notes == ["the images in more/images.npz are left out: name that file to use them"]


@pytest.mark.parametrize("inside", ["", "generated"])
def test_unfinished_images_of_generate_are_refused(inside, tmp_path):
    generated(tmp_path / "data" / inside, 3, status="running")
    with pytest.raises(ValueError, match=r"holds 3 of 3 images: let generate.py finish"):
        open_rows(str(tmp_path / "data"))


def test_missing_images_of_generate_are_noticed(tmp_path):
    folder = generated(tmp_path / "generated", 3)
    (folder / "images" / "0001.png").unlink()
    with pytest.raises(ValueError, match=r"holds 2 of 3 images"):
        open_rows(str(folder))
    assert len(open_rows(str(folder), split="train[:1]").images) == 1


def test_the_folder_of_a_training_run_is_no_data(tmp_path):
    write(tmp_path / "run", "training_options.yaml", "samples/final.png")
    with pytest.raises(ValueError, match=r"--dataset_name .*run is the folder of a training run"):
        open_rows(str(tmp_path / "run"))
    write(tmp_path, "0.png")
    source = open_rows(str(tmp_path))
    assert used(tmp_path) == ["0.png"]
    assert source.left_out == {"folder of a training run": 1}
    assert "run is the folder of a training run" in source.notes[0]


def test_output_inside_the_data_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "data", "0.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("data")
    for output, data in [("data/run", "data"), ("data", "./data/"), ("link/run", str(tmp_path / "data")), ("x", ".")]:
        with pytest.raises(ValueError, match=rf"^--output_dir {output}: is inside --dataset_name "):
            check_output_outside_data(output, data)
    for output, data in [("runs", "data"), ("data-runs", "data"), ("runs", "digits"), ("runs", "user/name")]:
        check_output_outside_data(output, data)
