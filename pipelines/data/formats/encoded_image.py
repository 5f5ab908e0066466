"""Decodes images with Pillow, without torch: pixels, sizes, and the instance ids of masks.

Damaged metadata does not make an image unusable. If an image does not decode, it is decoded again without its
metadata (see `metadata`).
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
_ORIENTATION = 0x0112  # tag in EXIF and TIFF
_UPRIGHT = {  # orientation -> transposition that turns the image upright
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
    """An image does not decode. This is the only error that `on_error: skip` ignores."""


def decoded(encoded: bytes, decode: Callable[[bytes], T]) -> T:
    """Returns `decode(encoded)`; if that fails, applies `decode` to the file without its metadata.

    Raises:
        DecodeError: the image does not decode without metadata either, or has too many pixels for Pillow.
    """
    try:
        return decode(encoded)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise _decode_error(error) from None
    except Exception as error:  # decoders raise errors of any type on corrupt bytes
        for keep_exif in (True, False):
            without = bare(encoded, keep_exif=keep_exif)
            if without is not None:
                with suppress(Exception):
                    return decode(without)
        raise _decode_error(error) from None


def image_size(encoded: bytes) -> tuple[int, int]:
    """(height, width) in stored pixels, from the header alone.

    Raises:
        DecodeError: the file does not begin with the header of an image.
    """
    width, height = decoded(encoded, lambda content: Image.open(io.BytesIO(content)).size)
    return height, width


def mask_ids(encoded: bytes) -> np.ndarray:
    """The instance ids of a grey (8 or 16 bit) or palette PNG: int64 (H, W), 0 is background.

    Raises:
        DecodeError: the mask is not an image, is truncated, or has a colour mode such as RGB.
    """
    try:
        image = decoded(encoded, open_image)
    except DecodeError as error:
        raise DecodeError(f"mask: {error}") from None
    if image.mode not in MASK_MODES:
        raise DecodeError(f"mask: mode {image.mode}; instance ids are grey, of 8 or 16 bits")
    return np.array(image).astype(np.int64)


def open_image(encoded: bytes, *, apply_exif: bool = False) -> Image.Image:
    """The first frame of a file, decoded by Pillow; with `apply_exif`, turned upright."""
    image: Image.Image = Image.open(io.BytesIO(encoded))
    image.load()
    transpose = _UPRIGHT.get(_orientation(image)) if apply_exif else None
    return image if transpose is None else image.transpose(transpose)


def _orientation(image: Image.Image) -> int:
    """The orientation in an image's metadata; 1 (upright) if it is missing or damaged."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's EXIF parser raises errors of any type on corrupt bytes
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts `image` to mode RGB with 8 bits per channel.

    Of 16-bit values the upper 8 bits are kept. Transparent images are composited over white.

    Raises:
        DecodeError: the pixels are floating-point numbers.
    """
    # Modes `I...` have 16 bits per pixel, or 32 that hold 16. Pillow would clip them to 255, not scale them.
    if image.mode.startswith("I"):
        return Image.fromarray((as_16_bits(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no known range; store 8 or 16 bits")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, WHITE)
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def as_16_bits(image: Image.Image) -> np.ndarray:
    """The pixels, uint16 (H, W), of an image in a mode `I...`; its transparent value becomes white."""
    pixels = np.array(image)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels = np.where(pixels == transparent, np.iinfo(np.uint16).max, pixels)
    return pixels.clip(0, np.iinfo(np.uint16).max).astype(np.uint16)


def _decode_error(error: Exception) -> DecodeError:
    """Converts an error of a decoder to a `DecodeError` with one line of text."""
    # Pillow's own message for an unknown format shows the memory address of the file object.
    unknown = isinstance(error, Image.UnidentifiedImageError)
    return DecodeError("not an image in a known format" if unknown else one_line(error))
