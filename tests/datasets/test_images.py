"""Whatever Pillow reads becomes RGB; what it can't is named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets import DataError
from datasets.images import decode, encode, fit, standard


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def ramp(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_blue_is_first_in_memory_where_that_is_free() -> None:
    jpeg, png = (stored(Image.fromarray(ramp(8, 8)), kind) for kind in ("JPEG", "PNG"))
    for data, size, last in (jpeg, 8, -1), (jpeg, 4, 1), (png, 8, 1):
        found = decode(data, "x", size, blue_first=True)
        assert found.tolist() == decode(data, "x", size).tolist()
        assert found.strides[2] == last


def test_rgb_comes_back_as_it_was() -> None:
    assert decode(stored(Image.fromarray(ramp()), "PNG"), "x").tolist() == ramp().tolist()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(ramp()).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    got = decode(stored(image, kind), "x")
    assert (got.shape, got.dtype) == ((6, 8, 3), np.uint8)
    assert got.tolist() == np.asarray(image.convert("RGB")).tolist()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 257, 65535, 128 * 257]], np.uint16)
    got = decode(stored(Image.fromarray(grey), "PNG"), "x")
    assert got.tolist() == [[[v] * 3 for v in (0, 1, 255, 128)]]


def test_what_shines_through_is_black() -> None:
    clear = Image.new("RGBA", (1, 1), (200, 100, 50, 0))
    assert decode(stored(clear, "PNG"), "x").tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_colour_may_be_said_to_shine_through(mode: str) -> None:
    image = Image.new("RGB", (2, 1), (255, 255, 255))
    image.putpixel((1, 0), (0, 0, 0))
    image = image.convert(mode)
    clear = (255, 255, 255) if mode == "RGB" else image.getpixel((0, 0))
    found = decode(stored(image, "PNG", transparency=clear), "x")
    assert found.tolist() == [[[0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_white_are_no_image(dtype: type) -> None:
    data = stored(Image.fromarray(np.full((4, 4), 200, dtype)), "TIFF")
    with pytest.raises(DataError, match=r"x: the image .* does not decode .32 bits a pixel"):
        decode(data, "x")
    wide = b"P5 1 1 65535\n" + (128 * 257).to_bytes(2, "big")  # Pillow has 32 bits for these 16
    assert decode(wide, "x").tolist() == [[[128] * 3]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(Image.fromarray(ramp()), "PNG", exif=exif)
    assert decode(data, "x").tolist() == np.rot90(ramp(), -1).tolist()
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    chunk, last = data[at:end], data.index(b"IEND") - 4
    behind = data[:at] + data[end:last] + chunk + data[last:]  # its pixels
    assert decode(behind, "x").tolist() == np.rot90(ramp(), -1).tolist()


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_has_pillows_own_bits(mode: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: list[dict[str, object]] = [{"progressive": True}, {"restart_marker_rows": 1}]
    kinds += [{"subsampling": s} for s in (0, 1, 2)] + [{"keep_rgb": True}, {"exif": turned}]
    for height, width in ((1, 1), (17, 33), (64, 48)):
        image = Image.fromarray(ramp(height, width)).convert(mode)
        for kind in kinds:
            data = stored(image, "JPEG", quality=90, **kind)
            want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            assert decode(data, "x").tolist() == np.asarray(want).tolist(), kind


@pytest.mark.parametrize("more", ["nothing", "comment", "icc_profile", "xmp", "exif"])
def test_a_shards_jpeg_has_pillows_own_bytes(more: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    given = {"exif": turned, "nothing": None}.get(more, b"words of some length")
    data = stored(Image.fromarray(ramp(48, 64)), "JPEG", **({} if given is None else {more: given}))
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    want = stored(fit(image, 16), "JPEG", quality=95)
    assert standard(data, "x", 16, 95)[0] == want


def test_a_shards_jpeg_has_the_quality_that_is_asked_for() -> None:
    data = encode(ramp(40, 40))
    for quality in (30, 95):
        made, pixels = standard(data, "x", 16, quality)
        assert made == stored(Image.fromarray(pixels), "JPEG", quality=quality)


def test_a_jpeg_that_ends_early_is_named() -> None:
    data = encode(ramp(64, 64))
    for end in range(0, len(data) - 2, 97):
        with pytest.raises(DataError, match="x"):
            decode(data[:end], "x")


@pytest.mark.parametrize("data", [b"", b"text", encode(ramp(64, 64))[:300]])
def test_what_does_not_decode_is_named(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^shard row 7: the image \(\d+ bytes\) does not") as error:
        decode(data, "shard row 7")
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(ramp())
    for limit in (40, 20):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=f"x: the image has more than {limit} pixels; make it"):
            decode(data, "x")


def fitted(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(fit(Image.fromarray(pixels), size))


@pytest.mark.parametrize(("height", "width"), [(40, 30), (30, 40), (7, 90), (5, 4), (16, 33)])
def test_fit(height: int, width: int) -> None:
    pixels = fitted(ramp(height, width), 16)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)


def test_fit_keeps_what_fits_and_cuts_the_centre() -> None:
    square, wide, tall = ramp(16, 16), ramp(16, 20), ramp(20, 16)
    assert (fitted(square, 16) == square).all()
    assert fitted(wide, 16).tolist() == wide[:, 2:18].tolist()
    assert fitted(tall, 16).tolist() == tall[2:18].tolist()


@pytest.mark.parametrize("side", [9, 40])
def test_fit_scales_bicubically_either_way(side: int) -> None:
    image = Image.fromarray(ramp(side, side))
    want = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.asarray(fit(image, 16)).tolist() == np.asarray(want).tolist()


def test_fit_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 200
    assert np.ptp(fitted(stripes, 8)[2:6]) < 10


def test_decode_fits_as_it_is_told() -> None:
    data = encode(ramp(20, 32))
    assert (decode(data, "x", 16) == fitted(decode(data, "x"), 16)).all()
    with pytest.raises(DataError, match="x: the image of 32x20 pixels is smaller than the crop of"):
        decode(data, "x", 24, least=24)


def test_encode_is_a_jpeg_near_the_image() -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    again = decode(encode(smooth, 95), "x")
    assert np.abs(again.astype(int) - smooth).mean() < 4
    assert len(encode(smooth, 30)) < len(encode(smooth, 95))
