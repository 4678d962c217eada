"""Bytes to pixels, pixels to the size that is wanted, and back."""

from __future__ import annotations

import io
import warnings
from functools import cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datasets import DataError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is read, as Pillow calls it. Its other formats are rare, and some run other programs."""

ENDINGS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "avif"),
)
"""How names of such files end."""

MAX_BYTES = 128 << 20
"""Of one encoded image."""

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and no companion that a Mac put beside one."""
    last = name.rpartition("/")[2]
    return not last.startswith("._") and last.rpartition(".")[2].lower() in ENDINGS


def decode(
    data: bytes,
    place: str,
    size: int | None = None,
    *,
    least: int = 0,
    blue_first: bool = False,
) -> Pixels:
    """The image in `data` (one of `FORMATS`) as uint8 [H, W, 3] RGB; fitted to `size` if given.

    Grey, palette, CMYK and 16-bit images become RGB, transparency lies on black, the EXIF
    orientation is applied, and of a moving image the first frame counts. With `blue_first` a JPEG
    of that size comes as a view of memory in which blue is first, so that its mirror image is that
    memory in reverse. Raises DataError, naming `place`, if the bytes don't decode, the image is
    absurdly large (a decompression bomb) or has 32 bits a pixel and so no white that is known, or a
    side has less than `least` pixels.
    """
    pixels = _plain_jpeg(data, blue_first_at=size if blue_first else None)
    if pixels is None:
        pixels = np.asarray(_rgb(data, place))
    height, width, _ = pixels.shape
    if min(height, width) < least:
        raise DataError(
            f"{place}: the image of {width}x{height} pixels is smaller than the crop of {least}; "
            "replace or remove it, or skip such ones (--on-error skip)"
        )
    if size is None or (height, width) == (size, size):
        return pixels
    return np.asarray(fit(Image.fromarray(pixels), size))


def fit(image: Image.Image, size: int) -> Image.Image:
    """The centre of an image, its shorter side scaled to `size`: `size` pixels each way.

    Scaling is bicubic and antialiased, upwards too. The image itself comes back if it fits.
    """
    if image.size == (size, size):
        return image
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    # Only what is kept is scaled, however long the longer side is.
    box = (left, top, left + short, top + short)
    if short == size:
        return image.crop(box)
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def standard(data: bytes, place: str, size: int, quality: int) -> tuple[bytes, Pixels]:
    """An encoded image as it goes into a shard, and its pixels, uint8 [size, size, 3].

    One that has that size already stays as it is, else it is fitted and encoded with `quality`.
    Raises DataError, naming `place`, if it does not decode.
    """
    pixels = _plain_jpeg(data, comments=False)  # which Pillow would write again
    image = _rgb(data, place) if pixels is None else Image.fromarray(pixels)
    if image.size == (size, size):
        return data, np.asarray(image)
    image = fit(image, size)
    return _jpeg(image, quality), np.asarray(image)


def encode(pixels: Pixels, quality: int = 95) -> bytes:
    """`pixels` uint8 [H, W, 3] as a JPEG of `quality` 1 to 100."""
    return _jpeg(Image.fromarray(pixels), quality)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _plain_jpeg(
    data: bytes, *, comments: bool = True, blue_first_at: int | None = None
) -> Pixels | None:
    """An upright JPEG in colour or grey, uint8 [H, W, 3]; of `blue_first_at` pixels each way, one
    with blue first in memory. None for all else, for what is damaged and, without `comments`, for
    one that has some.

    simplejpeg decodes these to the very bits that Pillow does, in less time. Of the rest Pillow
    knows what to do or to say.
    """
    try:
        if data[:2] != b"\xff\xd8" or _has(data, _APP1, b"Exif"):
            return None
        if not comments and _has(data, _COMMENT):
            return None
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        if height == width == blue_first_at:
            return simplejpeg.decode_jpeg(data, "BGR")[..., ::-1]
        return simplejpeg.decode_jpeg(data)
    except (ValueError, IndexError):
        return None


def _has(data: bytes, marker: int, start: bytes = b"") -> bool:
    """Whether a JPEG has such a segment. Raises IndexError where its segments are not in order."""
    at = 2
    while data[at + 1] != _SCAN:
        if data[at] != 0xFF:
            raise IndexError
        if data[at + 1] == marker and data.startswith(start, at + 4):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


# Markers of a JPEG's segments: where EXIF is, where words are, where pixels begin.
_APP1, _COMMENT, _SCAN = 0xE1, 0xFE, 0xDA


def _rgb(data: bytes, place: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                # Pillow asks the file for its EXIF in ways that cost time; most shards have none.
                upright = ImageOps.exif_transpose(image) if _turned(image) else image
                upright.load()
                return _to_rgb(upright, image.format)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{place}: the image has more than {Image.MAX_IMAGE_PIXELS} pixels; "
            "make it smaller or leave it out"
        ) from None
    except Exception as error:  # Pillow's plugins raise whatever their format's parser raises
        reason = str(error).partition("<_io")[0].strip() or type(error).__name__
        raise DataError(
            f"{place}: the image ({len(data)} bytes) does not decode ({reason}); "
            "replace or remove it, or skip such ones (--on-error skip)"
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _turned(image: Image.Image) -> bool:
    if image.format == "PNG":  # which may have it behind its pixels
        image.load()
    return "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    clear = "transparency" in image.info
    if image.mode == "RGB" and not clear:
        return image
    if image.mode == "F" or (image.mode == "I" and kind not in ("PPM", "PNG")):
        raise ValueError("32 bits a pixel")
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it, not scale it
        scaled = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    if clear or image.mode in ("LA", "PA", "RGBA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")
