"""Encoded images as Pillow reads them, without torch: their pixels and size, and the instance ids of masks.

Damaged metadata is no damage: an image that does not decode is tried again without its metadata, see `metadata`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np
from PIL import Image

from pipelines.data.formats.metadata import bare
from pipelines.data.shards.sample import DataError
from pipelines.storage.errors import one_line

MASK_MODES = ("1", "L", "P", "I;16", "I")
WHITE = (255, 255, 255, 255)
ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_ORIENTATION = 0x0112  # the tag of EXIF and TIFF
_UPRIGHT = {  # orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

T = TypeVar("T")


class DecodeError(DataError):
    """An image that does not decode: the one error that `on_error: skip` ignores."""


def decoded(encoded: bytes, decode: Callable[[bytes], T]) -> T:
    """`decode(encoded)`, or where that fails, `decode` of the file without its metadata.

    Raises:
        DecodeError: the image does not decode without metadata either.
    """
    try:
        return decode(encoded)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise _decode_error(error) from None
    except Exception as error:  # decoders meet corrupt bytes with errors of any type
        for keep_exif in (True, False):
            without = bare(encoded, keep_exif=keep_exif)
            if without is not None:
                with suppress(Exception):
                    return decode(without)
        raise _decode_error(error) from None


def image_size(encoded: bytes) -> tuple[int, int]:
    """(height, width) in stored pixels, from the header alone.

    Raises:
        DecodeError: the header is not an image's.
    """
    width, height = decoded(encoded, lambda content: Image.open(io.BytesIO(content)).size)
    return height, width


def mask_ids(encoded: bytes) -> np.ndarray:
    """The instance ids of a grey (8 or 16 bit) or palette PNG: int64 (H, W), 0 is background.

    Raises:
        DecodeError: not an image, truncated, or an image in colours.
    """
    try:
        image = decoded(encoded, open_image)
    except DecodeError as error:
        raise DecodeError(f"mask: {error}") from None
    if image.mode not in MASK_MODES:
        raise DecodeError(f"mask: mode {image.mode}; instance ids are grey, of 8 or 16 bits")
    return np.array(image).astype(np.int64)


def open_image(encoded: bytes, *, apply_exif: bool = False) -> Image.Image:
    """The first frame of a file, decoded by Pillow; with `apply_exif` turned as its orientation says."""
    image: Image.Image = Image.open(io.BytesIO(encoded))
    image.load()
    transpose = _UPRIGHT.get(_orientation(image)) if apply_exif else None
    return image if transpose is None else image.transpose(transpose)


def _orientation(image: Image.Image) -> int:
    """The orientation that a decoded image's metadata gives; 1, upright, if they give none or are damaged."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the parser of EXIF meets corrupt bytes with errors of any type
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, 8 bits a channel: 16 bits are cut to the upper 8, and what is transparent is laid on white.

    Raises:
        DecodeError: its pixels are floating-point numbers.
    """
    if image.mode.startswith(
        "I"
    ):  # 16 bits a pixel, or 32 that hold 16: Pillow would clip them, not scale them
        return Image.fromarray((as_16_bits(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no known range; store 8 or 16 bits")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, WHITE)
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def as_16_bits(image: Image.Image) -> np.ndarray:
    """The pixels, uint16 (H, W), of an image whose mode begins with `I`; the one that is transparent becomes white."""
    pixels = np.array(image)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels = np.where(pixels == transparent, np.iinfo(np.uint16).max, pixels)
    return pixels.clip(0, np.iinfo(np.uint16).max).astype(np.uint16)


def _decode_error(error: Exception) -> DecodeError:
    """An error of a decoder as a `DecodeError` of one line, without the addresses of objects."""
    unknown = isinstance(error, Image.UnidentifiedImageError)
    return DecodeError("not an image in a known format" if unknown else one_line(error))
