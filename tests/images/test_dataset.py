"""What is decided for all images of a data set: mode, size, range; and what becomes of bad ones."""

import sys

import numpy as np
import pytest
import torch
from image_helpers import (
    RED,
    as_tensor,
    batches,
    contents_with_bad_ones,
    decode,
    encoded,
    open_contents,
    open_source,
    random_pixels,
    sixteen_bits,
    write_folder,
    write_source,
)

from images import BadImage, ImageError, normalize, open_images

LOOKS = [  # every way to look at image i
    lambda dataset, i: decode(dataset),
    lambda dataset, i: dataset[i],
    lambda dataset, i: batches(dataset, 1, batch_size=len(dataset), placement="stream"),
]


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
    with pytest.raises(ValueError, match=r"6x4, not square: give --resolution"):
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


def squares(*sizes):
    return [encoded(np.full((size, size), 90, np.uint8)) for size in sizes]


def test_mixed_sizes_are_announced(tmp_path, caplog):
    source = write_source("images", tmp_path, squares(8, 8, 16))
    dataset = open_source(source, tmp_path)
    note = "images differ in size (of 3 images: 2 of 8x8, 1 of 16x16): all are resized and cropped to 8x8"
    assert dataset.contents()["notes"][0].startswith(note)
    assert "8x8 to 16x16" in dataset.describe()
    decode(dataset)
    assert caplog.text.count(note) == 1
    caplog.clear()
    assert open_source(source, tmp_path, resolution=8).contents()["notes"] == []
    assert caplog.text == ""


def test_sizes_that_the_sample_missed_are_announced_when_all_are_decoded(tmp_path):
    contents = squares(*[8] * 203)  # of which every third is looked at
    contents[1] = squares(4)[0]
    dataset = open_contents(tmp_path, contents, "saved")
    assert dataset.contents()["notes"] == []
    decode(dataset)
    assert "of 203 images: 202 of 8x8, 1 of 4x4" in dataset.contents()["notes"][0]
    assert "4x4 to 8x8" in dataset.describe()


# --------------------------------------------------------------------------------------- the range of the levels


def tiffs(tmp_path, mode, *images):
    """A folder of 8-pixel grey TIFFs of these levels."""
    contents = [encoded(sixteen_bits(levels, mode).resize((len(levels),) * 2, 0), "TIFF") for levels in images]
    return write_folder(tmp_path / "tiffs", contents)


def test_the_range_of_floats_is_one_for_all_images(tmp_path):
    dataset = open_source(tiffs(tmp_path, "F", [0, 1], [0, 255]), tmp_path)
    assert decode(dataset)[:, 0, 0].tolist() == [[0, 1], [0, 255]]
    assert dataset.contents()["notes"] == ["grey levels are floats, up to 255 in 2 images: 255 is white "
                                           "(else: --white_level)"]  # fmt: skip


def test_floats_up_to_one(tmp_path):
    assert decode(open_source(tiffs(tmp_path, "F", [0, 1], [0, 0.2]), tmp_path))[:, 0, 0].tolist() == [
        [0, 255],
        [0, 51],
    ]


def test_twelve_bits_in_sixteen_are_announced(tmp_path):
    source = tiffs(tmp_path, "I;16", [0, 819], [0, 4095])
    (note,) = open_source(source, tmp_path).contents()["notes"]
    assert "reach 4095 only" in note
    assert "--white_level 4095" in note
    dataset = open_source(source, tmp_path, white_level=4095)
    assert decode(dataset)[:, 0, 0].tolist() == [[0, 51], [0, 255]]
    assert dataset.contents()["notes"] == []


def test_all_sixteen_bits_are_nothing_unusual(tmp_path):
    assert open_source(tiffs(tmp_path, "I;16", [0, 40000]), tmp_path).contents()["notes"] == []


def test_almost_black_images_are_announced(tmp_path):
    dark = open_contents(tmp_path, [encoded(p) for p in random_pixels(3) // 16])
    assert "no level above 15 of 255" in dark.contents()["notes"][0]


def test_a_white_level_without_effect_is_announced(tmp_path):
    dataset = open_contents(tmp_path, [encoded(p) for p in random_pixels(3)], white_level=4095)
    assert dataset.contents()["notes"] == ["--white_level 4095 has no effect: in 3 images all are of 8 bits"]


def test_levels_outside_the_range_stop_at_once_or_where_they_are_met(tmp_path):
    source = tiffs(tmp_path, "F", [0, 1], [0, 300])
    with pytest.raises(ImageError, match=r"image 1: .*0001.png: grey levels 0\.\.300 .*: --white_level 300"):
        open_source(source, tmp_path)
    assert decode(open_source(source, tmp_path, white_level=300)).shape == (2, 1, 2, 2)
    late = tiffs(tmp_path / "late", "F", *[[0, 1]] * 203)
    (late / "0001.png").write_bytes(encoded(sixteen_bits([0, 2], "F").resize((2, 2), 0), "TIFF"))
    dataset = open_source(late, tmp_path, on_bad_image="skip")
    for look in LOOKS:
        with pytest.raises(ImageError, match=r"image 1: .*0001\.png: grey levels 0\.\.2 .*--white_level 2") as error:
            look(dataset, 1)
        assert not isinstance(error.value, BadImage)


# --------------------------------------------------------------------------------------- what it says of itself


def test_describe_other_sources(tmp_path):
    assert open_images("digits").describe() == "1,797 images of digits (10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; 8x8)"
    assert open_images("digits").contents() == {
        "images": 1797, "files": None, "classes": list("0123456789"), "left_out": {}, "notes": []
    }  # fmt: skip
    assert (
        open_images("digits", split="train[:10]").describe()
        == "10 images of digits (10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; 8x8)"
    )


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path):
    pixels = random_pixels(100)

    def fingerprint(name, kind="images", order=range(100)):
        return open_contents(tmp_path / name, [encoded(pixels[i]) for i in order], kind).fingerprint()

    same = fingerprint("a")
    assert same == fingerprint("b") == fingerprint("c", "saved")
    others = [range(99), [*range(100), 0], range(99, -1, -1), [0, *range(2, 100), 1]]
    assert len({same, *(fingerprint(f"d{i}", order=order) for i, order in enumerate(others))}) == 5


# ------------------------------------------------------------------------------------------ bad images


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


def test_progress_bar(digits, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    digits.decode_all(show_progress=False)
    assert capsys.readouterr().err == ""
    digits.decode_all(show_progress=True)
    assert "Decoding digits: 100%" in capsys.readouterr().err


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
