"""Encoded images as Pillow reads them, without torch: their size, and the instance ids of masks."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipelines.data.shards.sample import DataError
from pipelines.storage.errors import one_line

MASK_MODES = ("1", "L", "P", "I;16", "I")


class DecodeError(DataError):
    """An image that does not decode: the one error that `on_error: skip` ignores."""


def image_size(encoded: bytes) -> tuple[int, int]:
    """(height, width) in stored pixels, from the header alone.

    Raises:
        DecodeError: the header is not an image's.
    """
    try:
        width, height = Image.open(io.BytesIO(encoded)).size
    except Exception as error:  # decoders meet corrupt bytes with errors of any type
        raise decode_error(error) from None
    return height, width


def mask_ids(encoded: bytes) -> np.ndarray:
    """The instance ids of a grey (8 or 16 bit) or palette PNG: int64 (H, W), 0 is background.

    Raises:
        DecodeError: not an image, truncated, or an image in colours.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.mode in MASK_MODES:
            return np.array(image).astype(np.int64)
    except Exception as error:  # as above
        raise DecodeError(f"mask: {decode_error(error)}") from None
    raise DecodeError(f"mask: mode {image.mode}; instance ids are grey, of 8 or 16 bits")


def decode_error(error: Exception) -> DecodeError:
    """An error of a decoder as a `DecodeError` of one line, without the addresses of objects."""
    unknown = isinstance(error, Image.UnidentifiedImageError)
    return DecodeError("not an image in a known format" if unknown else one_line(error))
