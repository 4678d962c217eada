"""Bytes to pixels, pixels to the size that is wanted, and back."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datasets import DataError

Pixels = NDArray[np.uint8]

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""


def decode(data: bytes, place: str) -> Pixels:
    """The image in `data` (any format that Pillow reads) as uint8 [H, W, 3] RGB.

    Grey, palette, CMYK and 16-bit images become RGB, transparency lies on black, the EXIF
    orientation is applied, and of a moving image the first frame counts. Raises DataError, naming
    `place`, if the bytes don't decode or the image is absurdly large (a decompression bomb).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                # Pillow asks the file for its EXIF in ways that cost time; most shards have none.
                upright = ImageOps.exif_transpose(image) if _turned(image) else image
                return np.asarray(_to_rgb(upright))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{place}: the image has more than {Image.MAX_IMAGE_PIXELS} pixels; "
            "make it smaller or leave it out"
        ) from None
    except Exception as error:  # Pillow's plugins raise whatever their format's parser raises
        reason = str(error).partition("<_io")[0].strip() or type(error).__name__
        raise DataError(
            f"{place}: the image ({len(data)} bytes) does not decode ({reason}); "
            "replace or remove it"
        ) from error


def fit(pixels: Pixels, size: int) -> Pixels:
    """The centre of `pixels` uint8 [H, W, 3], its shorter side scaled to `size`: [size, size, 3].

    Scaling is bicubic and antialiased, upwards too. The same array comes back if it already fits.
    """
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    short = min(height, width)
    new_height, new_width = (max(size, round(side * size / short)) for side in (height, width))
    if short != size:
        image = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return pixels[top : top + size, left : left + size]


def encode(pixels: Pixels, quality: int = 95) -> bytes:
    """`pixels` uint8 [H, W, 3] as a JPEG of `quality` 1 to 100."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _turned(image: Image.Image) -> bool:
    return "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it, not scale it
        scaled = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")
