"""Files copied between this machine and a storage that all machines see."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from pipelines.storage.errors import StorageError, one_line
from pipelines.storage.files import file_system, make_folder, staged
from pipelines.storage.retry import is_remote, retry


def publish(folder: str | Path, url: str, names: Iterable[str]) -> str:
    """Copies the files `names` of a local folder to `url`, unless they are there, and returns `url`.

    Args:
        folder: of the files; they are not read if they are at `url` already.
        url: a place that only ever has this content, such as one named by its digest.
        names: the last file is written last and marks the others as complete.

    Raises:
        StorageError: a file is neither here nor there, or the storage does not exist.
        OSError: the storage refuses the files.
    """
    filesystem, root = file_system(url)
    *others, marker = names
    try:
        if retry(partial(filesystem.exists, f"{root}/{marker}"), url):
            return url
        for name in (*others, marker):
            if is_remote(url):
                make_folder(filesystem, str(PurePosixPath(root, name).parent))
                retry(partial(filesystem.put_file, str(Path(folder, name)), f"{root}/{name}"), url)
            else:
                with staged(f"{root}/{name}") as path:
                    shutil.copyfile(Path(folder, name), path)
    except FileNotFoundError as error:
        raise StorageError(f"{folder} cannot be put to {url}: {one_line(error)}") from None
    return url


def pull(url: str, folder: Path, names: Iterable[str]) -> None:
    """Copies the files `names` at `url` to a local folder, each whole or not at all.

    Raises:
        FileNotFoundError: a file is not there.
    """
    filesystem, root = file_system(url)
    for name in names:
        with staged(folder / name) as path:
            retry(partial(filesystem.get_file, f"{root}/{name}", str(path)), url)
