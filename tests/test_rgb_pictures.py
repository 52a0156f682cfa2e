"""Pictures of every kind as RGB."""

import io

import numpy as np
import pytest
from PIL import Image

from ldm.data.dis import ImageFolder
from ldm.pictures import as_rgb, open_picture
from ldm.util import UserError


def stored(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(data: bytes) -> tuple[np.ndarray, bool]:
    with open_picture(data) as image:
        found, transparent = as_rgb(image, "x")
        assert found.mode == "RGB"
        return np.asarray(found), transparent


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits(kind):
    levels = np.array([[0, 255, 256, 257, 32768, 65535]], dtype=np.uint16)
    found, transparent = rgb(stored(Image.fromarray(levels), kind))
    np.testing.assert_array_equal(found[0, :, 0], [0, 1, 1, 1, 128, 255])  # of 65535ths
    assert (found == found[..., :1]).all() and not transparent


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode):
    image = Image.new(mode, (4, 4), 300)
    with pytest.raises(UserError, match=f"grey levels of 32 bits.*{mode}"):
        rgb(stored(image, "tiff"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_opaque_pictures_are_pillows(mode):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    found, transparent = rgb(stored(image, "tiff"))
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    assert not transparent


def test_transparent_pixels_become_white():
    red = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    red.putpixel((1, 0), (10, 20, 30, 0))
    red.putpixel((2, 0), (100, 100, 0, 51))
    found, transparent = rgb(stored(red))
    assert transparent and found[0].tolist() == [[200, 0, 0], [255, 255, 255], [224, 224, 204]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint16))
    found, transparent = rgb(stored(grey, transparency=9))
    assert transparent and found[0, :, 0].tolist() == [0, 255]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    found, transparent = rgb(stored(palette, transparency=0))
    assert transparent and found[0].tolist() == [[255, 255, 255], [0, 255, 0]]


def test_transparency_is_told_once(tmp_path, caplog):
    for name, alpha in (("a", 255), ("b", 0), ("c", 128)):
        Image.new("RGBA", (4, 4), (0, 0, 0, alpha)).save(tmp_path / f"{name}.png")
    images = ImageFolder(tmp_path, image_size=4).images
    assert images[:, 0, 0, 0].tolist() == [0, 255, 127]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "2 pictures have transparent pixels, which become white; the first is" in record.getMessage()
    assert "b.png" in record.getMessage()


def test_a_flipped_bit_anywhere_in_a_png_is_noticed():
    data = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)))
    right = rgb(data)[0]
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 4
        try:
            np.testing.assert_array_equal(rgb(bytes(damaged))[0], right)
        except (OSError, SyntaxError, ValueError):
            continue


def test_names_of_pictures_that_are_no_files(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match=r"a\.png is not a file"):
        ImageFolder(tmp_path)
    (tmp_path / "a.png").rmdir()
    (tmp_path / "a.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"a\.png is not a file"):
        ImageFolder(tmp_path)
