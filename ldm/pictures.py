"""Pictures of any kind as square RGB: what data sets read from files, and what a model is handed."""

import io

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ldm.util import UserError

CHANGED = 3  # counts changes of what a picture becomes: earlier conversions are done again


# What turns a picture upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(data: bytes) -> Image.Image:
    """An encoded picture, not yet decoded. Of a PNG file all checksums are compared, which decoding alone does not do.

    Raises:
        Exception: of many kinds, for something else than a picture, or a damaged one.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError("it is no picture of a format that is known here") from error
    if image.format == "PNG":
        image.verify()  # after which it cannot be decoded any more
        image = Image.open(io.BytesIO(data))
    return image


def as_rgb(image: Image.Image, name: str) -> tuple[Image.Image, bool]:
    """A picture as 8-bit RGB, upright, and whether parts of it were transparent, which become white.

    Args:
        image: grey of 8 or 16 bits, a palette, RGB, CMYK, …, with or without transparency; an EXIF orientation is
            followed, as by every viewer. Of several frames or pages, the one that is open (the first).
        name: of its file, for the error.

    Raises:
        UserError: grey levels of 32 bits, or floating-point ones.
    """
    image.load()  # which turns a TIFF file upright, and takes the note of it away
    rgb, transparent = _as_rgb(image, name)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged notes, of many kinds; the picture may be whole
        orientation = 1
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb, transparent


def _as_rgb(image: Image.Image, name: str) -> tuple[Image.Image, bool]:
    """A picture as RGB, as it is stored."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise UserError(
            f"{name} has grey levels of 32 bits (mode {image.mode}), and does not say which is white: save it with 8 or"
            " 16 bits"
        )
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB"), False
    with_alpha = image.convert("RGBA")
    if np.asarray(with_alpha.getchannel("A")).min() == 255:
        return with_alpha.convert("RGB"), False
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, with_alpha).convert("RGB"), True


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, bool]:
    """A grey picture of levels 0..65535; Pillow's own conversion would make all above 255 white."""
    values = np.asarray(image).astype(np.int64)
    clear = values == image.info.get("transparency", -1)
    levels = (values * 255 + 32767) // 65535
    return Image.fromarray(np.where(clear, 255, levels).astype(np.uint8)).convert("RGB"), bool(clear.any())


def central_square(image: Image.Image, size: int) -> Image.Image:
    """The central square of a picture, of `size` × `size` pixels (Lanczos)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)
