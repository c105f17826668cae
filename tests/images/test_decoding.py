"""One image: every colour mode, levels of every depth, corrupt files."""

import io

import numpy as np
import pytest
from image_helpers import BAD_BYTES, BLUE, RED, WHITE, bad_bytes, encoded, random_pixels, sixteen_bits
from PIL import ExifTags, Image

from images import BadImage, ImageError, decode_image
from images.decoding import WhiteLevels


def one_pixel(mode, value):
    return Image.new(mode, (2, 2), value)


def palette_image(alphas=None):
    """2x1: the first pixel red, the second blue, with the alphas given."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return encoded(image, transparency=bytes(alphas)) if alphas else encoded(image)


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
    white_levels = WhiteLevels(floats=255 if "0..255" in name else 1)
    image = decode_image({"bytes": content, "path": None}, white_levels)
    assert image.mode == mode
    assert np.array_equal(np.asarray(image)[0], expected)


def test_the_files_have_the_modes_they_are_named_for():
    for name, (content, _, _) in COLOUR_MODES.items():
        mode = name.split()[0]
        assert Image.open(io.BytesIO(content)).mode == ("P" if mode == "GIF" else mode), name


@pytest.mark.parametrize(("mode", "values"), [("I", [-1, 5]), ("I", [0, 65536]), ("F", [-0.5, 0.5]), ("F", [0, 300])])
def test_levels_outside_the_range_are_errors_and_not_clipped(mode, values):
    with pytest.raises(ImageError, match=r"outside 0\.\..*--white_level") as error:
        decode_image({"bytes": encoded(sixteen_bits(values, mode), "TIFF"), "path": None})
    assert not isinstance(error.value, BadImage)  # skipping bad images must not skip these


def test_levels_that_are_no_numbers_are_bad():
    with pytest.raises(BadImage, match=r"no numbers"):
        decode_image({"bytes": encoded(sixteen_bits([float("nan"), 0.5], "F"), "TIFF"), "path": None})


def test_the_white_level_is_that_of_the_image_s_kind():
    white_levels = WhiteLevels(integers=4095, floats=2)
    for mode, values in [("I;16", [0, 819, 4095]), ("F", [0, 0.4, 2])]:
        image = decode_image({"bytes": encoded(sixteen_bits(values, mode), "TIFF"), "path": None}, white_levels)
        assert np.asarray(image)[0].tolist() == [0, 51, 255]


def test_pixels_are_an_image():
    pixels = random_pixels(1)[0]
    assert np.array_equal(np.asarray(decode_image(pixels)), pixels)
    assert decode_image(pixels[..., :1]).mode == "L"


def test_the_thumbnail_in_a_raw_file_is_not_the_image(tmp_path):
    (tmp_path / "a.NEF").write_bytes(encoded(random_pixels(1)[0], "TIFF"))
    with pytest.raises(BadImage, match=r"a\.NEF: a camera's raw file"):
        decode_image({"bytes": None, "path": str(tmp_path / "a.NEF")})


def test_bytes_count_and_not_the_path_they_once_had():
    entry = {"bytes": encoded(one_pixel("L", 37)), "path": "image.png"}
    assert decode_image(entry).getpixel((0, 0)) == 37


def test_exif_orientation():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned by 90 degrees clockwise
    image = decode_image({"bytes": encoded(pixels, exif=exif), "path": None})
    assert np.array_equal(np.asarray(image), np.rot90(pixels, -1))


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
