"""Latents that are damaged or of something else, folders of others, and disks that are full: refused by name."""

import json
import shutil
import types

import numpy as np
import pytest
from latents_helpers import BATCH_SIZE, IDENTITY, Kill, contents, kill, make_vae, open_in

import images.encoding
import images.latent_files
from images import open_images

pytest_plugins = ["latents_fixtures"]


def flip_a_byte(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def save(**array):
    return lambda path: np.save(path, **array)


DAMAGE = {
    "flipped": (flip_a_byte, "checksum"),
    "header": (lambda path: flip_a_byte(path, 20), "damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "longer": (lambda path: path.open("ab").write(b"0"), "behind its end"),
    "shape": (save(arr=np.zeros((4, 1, 2, 3, 4, 4), np.float16)), r"holds float16 \[4, 1, 2, 3, 4, 4\]"),
    "dtype": (save(arr=np.zeros((4, 2, 2, 3, 4, 4), np.float32)), "holds float32"),
    "objects": (save(arr=np.array([{}] * 4)), "damaged"),
    "record": (lambda path: flip_a_byte(path.with_suffix(".json"), 12), "damaged"),
    "bad": (lambda path: path.with_suffix(".json").write_text('{"crc32": 1, "bad_images": []}'), "something else"),
    "unnoted": (lambda path: path.with_suffix(".json").unlink(), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_mended(dataset, vae, filled, copied, kind, encodings):
    harm, match = DAMAGE[kind]
    path = copied / "moments-00005.npy"
    harm(path)
    before = contents(copied)
    with pytest.raises(ValueError, match=rf"moments-00005\.npy is damaged: .*{match if match != 'damaged' else ''}"):
        open_in(copied, dataset, vae)
    assert contents(copied) == before
    path.unlink()  # as the message says
    open_in(copied, dataset, vae)
    assert encodings == [BATCH_SIZE]
    assert contents(copied) == contents(filled)


def test_what_nobody_wrote_to_is_not_read_again(dataset, vae, copied, monkeypatch):
    """All of ImageNet's latents would be 42 GB at each start."""
    checked, checksum = [], images.latent_files._checksum
    monkeypatch.setattr(images.latent_files, "_checksum", lambda *args: checked.append(args) or checksum(*args))
    open_in(copied, dataset, vae)
    assert checked == []
    for path, kind in [("moments-00003", "npy"), ("moments-00007", "json")]:
        (copied / f"{path}.{kind}").touch()
    open_in(copied, dataset, vae)
    assert len(checked) == 2
    open_in(copied, dataset, vae)  # which are noted to be intact then
    assert len(checked) == 2
    (copied / "moments-00004.npy").unlink()
    open_in(copied, dataset, vae)
    open_in(copied, dataset, vae)
    assert len(checked) == 3  # to be noted when it was written


def test_each_process_checks_its_share(dataset, vae, copied):
    flip_a_byte(copied / "moments-00005.npy")
    with pytest.raises(ValueError, match="moments-00005"):
        open_in(copied, dataset, vae, rank=1, world_size=2)
    open_in(copied, dataset, vae, rank=0, world_size=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"identity": {**IDENTITY, "sha256": "4567"}}, r"holds other latents: vae sha256 was 0123, now it is 4567\. "),
        ({"identity": {**IDENTITY, "name": "x"}}, "vae name was None, now it is x"),
        ({"batch_size": 2}, "batch_size was 4, now it is 2"),
        ({"dataset": {"split": "train[:54]"}}, "images was 55, now it is 54"),
        ({"dataset": {"split": "train[55:110]"}}, "fingerprint was 55-[0-9a-f]+, now it is 55-[0-9a-f]+. Choose"),
        ({"dataset": {"resolution": 16}}, r"image_shape was \[1, 8, 8\], now it is \[1, 16, 16\]"),
        ({"dataset": {"image_mode": "RGB"}}, r"image_shape was \[1, 8, 8\], now it is \[3, 8, 8\]"),
        ({"dataset": {"white_level": 300}}, "white_levels integers was 65535, now it is 300"),
    ],
)
def test_other_latents_are_refused(options, match, filled):
    dataset = open_images("digits", **{"split": "train[:55]", **options.pop("dataset", {})})
    before = contents(filled)
    with pytest.raises(ValueError, match=rf"--latents_dir {filled}: .*{match}"):
        open_in(filled, dataset, make_vae(channels=dataset.channels), **options)
    assert contents(filled) == before


def test_an_unfinished_folder_is_not_filled_with_other_latents(vae, dataset, tmp_path):
    with pytest.raises(Kill):
        open_in(tmp_path, dataset, vae, wait=kill)  # the index is there, and no block
    with pytest.raises(ValueError, match="holds other latents"):
        open_in(tmp_path, open_images("digits", split="train[55:110]"), vae)
    open_in(tmp_path, dataset, vae)


def test_parts_of_the_same_images_are_told_apart(vae, tmp_path):
    """Of 100 images one half or the other; held out, or trained on."""
    parts = open_images("digits", split="train[:100]").hold_out(0.5)
    latents = [open_in(tmp_path / str(i), part, vae) for i, part in enumerate(parts)]
    assert len({part.fingerprint() for part in latents}) == 2
    for i, part in enumerate(parts):
        with pytest.raises(ValueError, match="fingerprint was 50-"):
            open_in(tmp_path / str(1 - i), part, vae)


def test_another_vae_has_another_fingerprint(dataset, vae, filled, tmp_path):
    latents = open_in(filled, dataset, vae)
    other = open_in(tmp_path, dataset, vae, identity={**IDENTITY, "sha256": "4567"})
    assert latents.fingerprint() != other.fingerprint()
    assert latents.fingerprint() == open_in(filled, dataset, vae).fingerprint()
    assert dataset.fingerprint() in latents.fingerprint()


def test_folders_of_others_are_left_alone(dataset, vae, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"--latents_dir {tmp_path}: is not empty, .* holds photo\.png and no index"):
        open_in(tmp_path, dataset, vae)
    assert contents(tmp_path) == {"photo.png": b"mine"}
    with pytest.raises(ValueError, match=r"--latents_dir .*photo\.png"):
        open_in(tmp_path / "photo.png", dataset, vae)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"images": 1}', b'{"images', b"\xff"])
def test_an_index_of_something_else(dataset, vae, content, tmp_path):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"--latents_dir {tmp_path}"):
        open_in(tmp_path, dataset, vae)
    assert contents(tmp_path) == {"index.json": content}


def test_files_of_others_in_a_folder_of_latents_stay(dataset, vae, filled, copied):
    (copied / "notes.txt").write_text("mine")
    (copied / "moments-00003.npy").unlink()
    open_in(copied, dataset, vae)
    assert contents(copied) == {**contents(filled), "notes.txt": b"mine"}


def test_too_little_space(dataset, vae, copied, tmp_path, monkeypatch):
    image = 2 * 2 * 3 * 4 * 4 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=55 * image - 1))
    with pytest.raises(ValueError, match=rf"--latents_dir {tmp_path}/new: .* need 0\.0 MB more, and 0\.0 MB are free"):
        open_in(tmp_path / "new", dataset, vae)
    assert contents(tmp_path / "new") == {}
    (copied / "moments-00003.npy").unlink()  # of a batch, which is all that is missing
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=BATCH_SIZE * image))
    open_in(copied, dataset, vae)


def test_a_disk_that_is_full_after_all(dataset, vae, filled, tmp_path, monkeypatch):
    def full(file, *args, **options):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match=r"moments-00000\.npy could not be written: .*No space left"):
            open_in(tmp_path, dataset, vae)
    assert set(contents(tmp_path)) == {"index.json", "moments-00000.json"}
    open_in(tmp_path, dataset, vae)
    assert contents(tmp_path) == contents(filled)


def test_images_that_the_vae_cannot_encode(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"--vae: .* 3 channel.* 1; pass --image_mode RGB"):
        open_in(tmp_path, dataset, make_vae(channels=3))
    with pytest.raises(ValueError, match=r"--resolution 7: is no multiple of 2"):
        open_in(tmp_path, open_images("digits", resolution=7), make_vae())


def test_the_index_is_readable(filled):
    index = json.loads((filled / "index.json").read_text())
    assert index["vae"] == IDENTITY
    assert index["images"] == 55
    assert index["dtype"] == "float16"
    assert index["moments"] == [2, 2, 3, 4, 4]
    assert index["images_per_file"] == index["batch_size"] == BATCH_SIZE
