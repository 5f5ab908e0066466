"""A PNG writer whose output bytes depend only on the pixels.

Compressed bytes differ between zlib, zlib-ng and processors. So by default the pixels lie in stored
(uncompressed) deflate blocks, which are also the fastest to write and to read. With `deflate` the file is
smaller, but its bytes are the same only under the same zlib.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_STORED_BLOCK = 65535  # most bytes a stored deflate block can hold
_COLOUR_TYPE = {1: 0, 3: 2}  # channels -> PNG colour type (grey, RGB)


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.uint16], *, deflate: bool = False) -> bytes:
    """The PNG of (H, W) grey or (H, W, 3) RGB pixels of 8 or 16 bits, stored or compressed (`deflate`)."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    size = pixels.dtype.itemsize  # bytes per value
    # Each row starts with the number of its filter: 0, no filter
    rows = np.zeros((height, 1 + width * channels * size), np.uint8)
    rows[:, 1:] = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8 * size, _COLOUR_TYPE[channels], 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 6) if deflate else _stored(rows.tobytes())
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND")


def _chunk(kind: bytes, content: bytes = b"") -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def _stored(data: bytes) -> bytes:
    """`data` as a zlib stream of stored blocks (RFC 1950, RFC 1951 section 3.2.4)."""
    parts = [b"\x78\x01"]
    for start in range(0, len(data), _STORED_BLOCK):
        block = data[start : start + _STORED_BLOCK]
        final = start + _STORED_BLOCK >= len(data)
        parts += [struct.pack("<BHH", final, len(block), len(block) ^ 0xFFFF), block]
    return b"".join([*parts, struct.pack(">I", zlib.adler32(data))])
