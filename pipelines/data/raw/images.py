"""Finds the images of a folder or archive, refers to them by unique keys, and reads them as samples."""

from __future__ import annotations

import io
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image

from pipelines.data.formats import archive
from pipelines.data.formats.archive import Contents, Ref
from pipelines.data.formats.encoded_image import DecodeError, as_16_bits, decoded, open_image, to_rgb
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.raw.holdout import held_out
from pipelines.data.raw.keys import keys_of
from pipelines.data.shards.sample import DataError, Sample

# Suffix -> extension in shards, of the formats whose bytes are stored unchanged
_KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".png": "png", ".webp": "webp"}
_ENCODED_ANEW = {".bmp", ".gif", ".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff"}  # stored as PNG
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # Pillow modes that PNG stores without loss
_NO_IMAGES = "files that are not images by their names"

Classes = dict[str, list[str]]  # class -> paths of its images in the archive


def is_image(path: str) -> bool:
    """Returns True if the suffix of a path is that of an image."""
    return posixpath.splitext(path)[1].lower() in {*_KEPT, *_ENCODED_ANEW}


def classes_of(contents: Contents, folder: str, where: str, left_out: LeftOut) -> Classes:
    """The images below `folder/<class>/`, sorted, by class; empty if `folder` is missing.

    Other files are counted in `left_out`. Class names are normalised to Unicode's composed form (NFC),
    because systems differ in the form of file names, and splits may have been packed on different systems.

    Raises:
        DataError: a class folder is empty, images lie outside of class folders, or an entry cannot be read.
    """
    _check_entries(contents, folder, where)
    prefix = posixpath.normpath(folder) + "/"
    classes: Classes = {
        _composed(name.removeprefix(prefix)): []
        for name in sorted(contents.folders)
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }
    loose: list[str] = []
    for path in sorted(contents.files):
        if path.startswith(prefix):
            class_name, slash, _ = path.removeprefix(prefix).partition("/")
            images = classes.setdefault(_composed(class_name), []) if slash else loose
            if is_image(path):
                images.append(path)
            else:
                left_out.add(_NO_IMAGES, path)
    if loose:
        raise DataError(
            f"{where}: {len(loose)} images lie in {folder}/ itself, such as {loose[0]}: "
            f"sort by {folder}/<class>/"
        )
    for class_name, images in classes.items():
        if not images:
            raise DataError(
                f"{where}: class folder {prefix}{class_name} has no image: fill it, or remove it everywhere"
            )
    return classes


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _check_entries(contents: Contents, folder: str, where: str) -> None:
    """Raises `DataError` if `folder` or a class folder is a broken link, or an image may not be read.

    Other broken links are merely left out. A missing class, however, would change the labels of the others.
    """
    top = posixpath.normpath(folder)
    for path, reason in contents.unusable:
        is_folder = f"{top}/".startswith(f"{path}/") or (
            posixpath.dirname(path) == top and not is_image(path)
        )
        if is_folder and reason in archive.LINKS:
            raise DataError(f"{where}: {path}: {reason}: mend or remove it")
        if path.startswith(f"{top}/") and is_image(path) and reason == archive.UNREADABLE:
            raise DataError(f"{where}: {path} may not be read: give the right to read it, or remove it")


def references(
    contents: Contents, folder: str, images: Mapping[str, Iterable[str]], classes: tuple[str, ...]
) -> list[Ref]:
    """References, with unique keys, to the images below `folder/<class>/`, class by class in label order."""
    prefix = posixpath.normpath(folder) + "/"
    listed = [(path, name, label) for label, name in enumerate(classes) for path in images.get(name, ())]
    keys = keys_of(
        {path: f"{name}_{_stem(path.removeprefix(prefix).partition('/')[2])}" for path, name, _ in listed}
    )
    return [_reference(contents, path, keys[path], label) for path, _, label in listed]


def unlabelled(contents: Contents, folder: str, where: str, left_out: LeftOut) -> list[Ref]:
    """References to the images at any depth below `folder`, sorted by path.

    Other files are counted in `left_out`.

    Raises:
        DataError: an image or the folder cannot be read.
    """
    _check_entries(contents, folder, where)
    prefix = posixpath.normpath(folder) + "/"
    below = [path for path in sorted(contents.files) if path.startswith(prefix)]
    paths = [path for path in below if is_image(path)]
    for path in below:
        if not is_image(path):
            left_out.add(_NO_IMAGES, path)
    keys = keys_of({path: _stem(path.removeprefix(prefix)) for path in paths})
    return [_reference(contents, path, keys[path], None) for path in paths]


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _reference(contents: Contents, path: str, key: str, label: int | None) -> Ref:
    member = contents.files[path]
    return Ref(key, member.place, member.offset, member.size, label, path)


def split_off(refs: list[Ref], count: int, seed: int) -> tuple[list[Ref], list[Ref]]:
    """(training references, `count` held-out references), stratified by label, each in the original order."""
    chosen = held_out([ref.label or 0 for ref in refs], count, seed)
    return [ref for i, ref in enumerate(refs) if i not in chosen], [
        ref for i, ref in enumerate(refs) if i in chosen
    ]


def load_image(raw: Path, ref: Ref) -> Sample:
    """The sample at `ref`. JPEG, PNG and WebP keep their bytes; other formats are converted to PNG.

    A file that does not decode keeps its bytes in any format: training raises an error or skips it
    (`data.on_error`).

    Raises:
        DataError: the file is missing or has changed.
    """
    content = archive.read(raw, ref)
    suffix = posixpath.splitext(ref.path)[1].lower()
    if suffix not in _KEPT:
        with suppress(DecodeError):
            content = _as_png(content, ref.path)
    return Sample(ref.key, content, _KEPT.get(suffix, "png"), label=ref.label)


def _as_png(encoded: bytes, name: str) -> bytes:
    """The PNG of an image's first frame, turned upright.

    Pixels in a mode that PNG can store are unchanged; others are converted to 8-bit RGB.

    Raises:
        DecodeError: the image does not decode; the error names `name`.
    """
    try:
        image = decoded(encoded, partial(open_image, apply_exif=True))
        if image.mode.startswith("I"):
            image = Image.fromarray(as_16_bits(image))
        elif image.mode not in _PNG_MODES:
            image = to_rgb(image)
    except DecodeError as error:
        raise DecodeError(f"{name}: does not decode: {error}") from None
    output = io.BytesIO()
    image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    image.save(output, "png", compress_level=6)
    return output.getvalue()
