"""Removes the metadata from encoded images.

The result decodes even if EXIF, colour profile, texts or thumbnail of the original are damaged.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_METADATA = {*range(0xE0, 0xF0), 0xFE}  # APP0 to APP15 and comments
# Adobe's APP14 segment says how colours are stored; the least bytes of a complete one
_JPEG_COLOURS, _LEAST_COLOURS = 0xEE, 16
_JPEG_SCAN = 0xDA
_WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # chunk -> its flag in VP8X
# fmt: off
_TIFF_PIXELS = {  # tags that say how pixels are stored and which way is up
    *(254, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 284, 290, 291, 292, 293, 301, 317, 318,
      319, 320, 321),
    *(322, 323, 324, 325, 332, 333, 334, 336, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520,
      521),
    *(529, 530, 531, 532, 32995, 32996, 32997, 34016),
}
# fmt: on


def bare(encoded: bytes, *, keep_exif: bool) -> bytes | None:
    """A JPEG, PNG, WebP or TIFF file without its metadata.

    Returns `None` for other formats, and if the file's structure is broken.

    Args:
        encoded: content of the file.
        keep_exif: keep EXIF, which says which way is up. A TIFF always keeps its orientation tag.
    """
    formats: dict[bytes, Callable[[bytes, bool], bytes]] = {
        b"\xff\xd8": _bare_jpeg,
        _PNG[:2]: _bare_png,
        b"RI": _bare_webp,
        b"II": _bare_tiff,
        b"MM": _bare_tiff,
    }
    strip = formats.get(encoded[:2])
    try:
        return None if strip is None else strip(encoded, keep_exif)
    except (struct.error, IndexError, ValueError):
        return None


def _bare_jpeg(encoded: bytes, keep_exif: bool) -> bytes:
    """Start, tables and frame header of a JPEG, and everything from its first scan on."""
    kept, place = [encoded[:2]], 2
    while encoded[place + 1] != _JPEG_SCAN:
        if encoded[place] != 0xFF:
            raise ValueError("no marker")
        if encoded[place + 1] == 0xFF:  # padding
            place += 1
            continue
        end = place + 2 + struct.unpack_from(">H", encoded, place + 2)[0]
        is_exif = encoded[place + 4 : place + 10] == b"Exif\0\0"
        is_colours = encoded[place + 1] == _JPEG_COLOURS and end - place >= _LEAST_COLOURS
        if encoded[place + 1] not in _JPEG_METADATA or is_colours or (is_exif and keep_exif):
            kept.append(encoded[place:end])
        place = end
    return b"".join([*kept, encoded[place:]])


def _bare_png(encoded: bytes, keep_exif: bool) -> bytes:
    """The critical chunks of a PNG, and those of its transparency and EXIF (`keep_exif`) that are intact."""
    wanted = (b"tRNS", b"eXIf") if keep_exif else (b"tRNS",)
    kept = [_PNG]
    for kind, chunk in _chunks(encoded, len(_PNG), ">I4s", ahead=8, behind=4):
        if kind[:1].isupper() or (
            kind in wanted and struct.pack(">I", zlib.crc32(chunk[4:-4])) == chunk[-4:]
        ):
            kept.append(chunk)
    return b"".join(kept)


def _bare_webp(encoded: bytes, keep_exif: bool) -> bytes:
    """A WebP file without its metadata chunks and without the flags that announce them."""
    dropped = {kind: flag for kind, flag in _WEBP_METADATA.items() if kind != b"EXIF" or not keep_exif}
    kept = []
    for kind, chunk in _chunks(encoded, 12, "<4sI", ahead=8, behind=0):
        if kind == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~sum(dropped.values())]) + chunk[9:]
        if kind not in dropped:
            kept.append(chunk + bytes(len(chunk) % 2))
    content = b"".join([encoded[8:12], *kept])
    return encoded[:4] + struct.pack("<I", len(content)) + content


def _chunks(
    encoded: bytes, place: int, header: str, *, ahead: int, behind: int
) -> Iterator[tuple[bytes, bytes]]:
    """Yields (kind, bytes) of each chunk from `place` on.

    Args:
        encoded: content of the file.
        place: offset of the first chunk.
        header: struct format of a chunk's kind and size, in either order.
        ahead: bytes before a chunk's content.
        behind: bytes after a chunk's content.
    """
    while place + ahead <= len(encoded):
        first, second = struct.unpack_from(header, encoded, place)
        kind, size = (second, first) if isinstance(second, bytes) else (first, second)
        end = place + ahead + size + behind
        yield kind, encoded[place:end]
        place = end + (size % 2 if behind == 0 else 0)  # RIFF pads to even sizes


def _bare_tiff(encoded: bytes, keep_exif: bool) -> bytes:
    """A TIFF file with its first directory alone, reduced to the tags in `_TIFF_PIXELS`."""
    order = "<" if encoded[:1] == b"I" else ">"
    is_big = struct.unpack_from(f"{order}H", encoded, 2)[0] == 43  # BigTIFF
    offset, number, size, start = ("Q", "Q", 20, 8) if is_big else ("I", "H", 12, 4)
    place = struct.unpack_from(order + offset, encoded, start)[0]
    count = struct.unpack_from(order + number, encoded, place)[0]
    first = place + struct.calcsize(number)
    entries = [
        encoded[first + size * entry : first + size * (entry + 1)]
        for entry in range(min(count, len(encoded) // size))
    ]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _TIFF_PIXELS]
    directory = struct.pack(order + number, len(kept)) + b"".join(kept) + bytes(struct.calcsize(offset))
    return encoded[:place] + directory + encoded[place + len(directory) :]
