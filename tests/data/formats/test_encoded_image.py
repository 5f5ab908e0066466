"""Images with damaged metadata decode, and images converted to PNG keep their pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from pipelines.data.formats.encoded_image import DecodeError, decoded, image_size, open_image, to_rgb
from pipelines.data.loading.decode import decode_image
from pipelines.data.raw.images import _as_png

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)).resize((60, 40))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # a quarter turn
EXIF.get_ifd(0x8769)[0x9003] = "2026:11:27 12:00:00"


def saved(kind: str, image: Image.Image = PHOTO, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, TURNED_JPEG = saved("JPEG", quality=90), saved("JPEG", quality=90, exif=EXIF)
PNG, TURNED_PNG = saved("PNG"), saved("PNG", exif=EXIF)
WEBP = saved("WEBP", lossless=True)
TIFF = saved("TIFF", dpi=(72, 72))


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def with_chunk(png: bytes, kind: bytes, content: bytes, damage: int = 0) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content) ^ damage)
    return png[:33] + struct.pack(">I", len(content)) + kind + content + checksum + png[33:]


def damaged() -> Iterator[tuple[str, bytes, bytes]]:
    """Yields (name, intact file, the same file with damaged metadata)."""
    exif = TURNED_JPEG.index(b"Exif\0\0") + 6
    yield "trailing bytes", JPEG, JPEG + b"junk" * 99
    yield "exif", JPEG, TURNED_JPEG[:exif] + b"\xff" * 40 + TURNED_JPEG[exif + 40 :]
    yield "exif that ends early", JPEG, with_segment(JPEG, 0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")
    yield "colour profile", TURNED_JPEG, with_segment(TURNED_JPEG, 0xE2, b"ICC_PROFILE\0\1")
    yield "further images", TURNED_JPEG, with_segment(TURNED_JPEG, 0xE2, b"MPF\0MM\0*nothing")
    yield "header of JFIF", TURNED_JPEG, with_segment(TURNED_JPEG, 0xE0, b"JFIF")
    yield "segment of Adobe", JPEG, with_segment(JPEG, 0xEE, b"Adobe")
    yield "trailing bytes of PNG", PNG, PNG + b"junk" * 99
    yield "end of PNG", PNG, PNG[:-6]
    for kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"pHYs", b"cHRM", b"tIME", b"acTL"):
        yield f"{kind.decode()}", TURNED_PNG, with_chunk(TURNED_PNG, kind, b"x")
        yield f"checksum of {kind.decode()}", TURNED_PNG, with_chunk(TURNED_PNG, kind, b"x", damage=1)
    yield "exif of PNG", PNG, with_chunk(PNG, b"eXIf", b"MM\0*", damage=1)
    yield "much text", TURNED_PNG, with_chunk(TURNED_PNG, b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))
    yield "text that is cut", PNG, PNG[:-12] + struct.pack(">I4s", 500, b"tEXt") + b"cut"
    turned = saved("WEBP", lossless=True, exif=EXIF)
    yield "exif of WebP", WEBP, turned[: turned.index(b"EXIF") + 20]
    yield "trailing bytes of WebP", WEBP, WEBP + b"junk" * 99
    start = struct.unpack("<I", TIFF[4:8])[0]
    entries = struct.unpack_from("<H", TIFF, start)[0]
    resolution = next(
        at for at in range(start + 2, len(TIFF), 12) if TIFF[at : at + 2] == struct.pack("<H", 282)
    )
    yield "resolution", TIFF, TIFF[: resolution + 4] + bytes(4) + TIFF[resolution + 8 :]
    end = start + 2 + 12 * entries
    yield "thumbnail", TIFF, TIFF[:end] + b"\xf0\xff\xff\xff" + TIFF[end + 4 :]
    for name, whole in (("GIF", saved("GIF")), ("BMP", saved("BMP")), ("PPM", saved("PPM"))):
        yield f"trailing bytes of {name}", whole, whole + b"junk" * 99


@pytest.mark.parametrize(("whole", "broken"), [pytest.param(*files, id=name) for name, *files in damaged()])
def test_damaged_metadata_changes_no_pixel(whole, broken):
    assert (decode_image(broken) == decode_image(whole)).all()
    assert (decode_image(broken, apply_exif=False) == decode_image(whole, apply_exif=False)).all()
    assert image_size(broken) == image_size(whole)
    assert np.array_equal(upright(_as_png(broken, "x")), upright(whole))


def upright(file: bytes) -> np.ndarray:
    """The pixels as Pillow alone decodes them."""
    return np.array(to_rgb(open_image(file, apply_exif=True)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_damaged_pixels_are_damage(kind):
    file = saved(kind)
    for cut in (len(file) // 2, 12, 0):
        with pytest.raises(DecodeError):
            decode_image(file[:cut])
        with pytest.raises(DecodeError, match=r"^some/x\.tif: does not decode: [^\n]*$"):
            _as_png(file[:cut], "some/x.tif")


def test_a_png_whose_pixels_have_another_checksum_is_damaged():
    place = PNG.index(b"IDAT") + 10
    with pytest.raises(DecodeError):
        decode_image(PNG[:place] + bytes([PNG[place] ^ 1]) + PNG[place + 1 :])


DEEP = np.arange(1200).reshape(30, 40) * 50


def images() -> Iterator[tuple[str, bytes]]:
    grey = PHOTO.convert("L")
    yield "I;16", saved("TIFF", Image.fromarray(DEEP.astype("<u2")))
    yield "I;16B", saved("TIFF", Image.frombytes("I;16B", (40, 30), DEEP.astype(">u2").tobytes()))
    yield "I", saved("TIFF", Image.fromarray(DEEP.astype("i4") - 500))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        yield mode, saved("TIFF", (grey if mode in ("1", "L", "LA") else PHOTO).convert(mode))
    yield "CMYK by LZW", saved("TIFF", PHOTO.convert("CMYK"), compression="tiff_lzw")
    yield "turned", saved("TIFF", exif=EXIF)
    yield "profile", saved("TIFF", icc_profile=b"no profile")
    yield "GIF", saved("GIF")
    yield "GIF that is transparent", saved("GIF", PHOTO.quantize(8), transparency=3)
    yield (
        "PNG of 16 bits that is transparent",
        saved("PNG", Image.fromarray(DEEP.astype("u2")), transparency=5000),
    )
    yield "BMP", saved("BMP", PHOTO.convert("P"))
    yield "PBM", saved("PPM", PHOTO.convert("1"))


@pytest.mark.parametrize("file", [pytest.param(file, id=name) for name, file in images()])
def test_the_png_of_an_image_decodes_to_the_image(file):
    assert (decode_image(_as_png(file, "x")) == decode_image(file)).all()


def test_deep_pixels_stay_deep_and_what_is_transparent_is_white():
    big_endian = saved("TIFF", Image.frombytes("I;16B", (40, 30), DEEP.astype(">u2").tobytes()))
    assert np.array_equal(np.array(Image.open(io.BytesIO(_as_png(big_endian, "x")))), DEEP)
    transparent = saved("PNG", Image.fromarray(DEEP.astype("u2")), transparency=5000)
    assert ((decode_image(transparent)[0] == 255).numpy() == (DEEP == 5000)).all()


def test_floating_point_pixels_are_refused_by_name():
    with pytest.raises(
        DecodeError, match=r"^x\.tif: does not decode: floating-point pixels have no known range"
    ):
        _as_png(saved("TIFF", Image.fromarray(np.ones((2, 2), np.float32))), "x.tif")


def test_what_is_too_large_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    tries = []
    with pytest.raises(DecodeError, match="decompression bomb"):
        decoded(PNG, lambda file: (tries.append(1), open_image(file)))
    assert len(tries) == 1
