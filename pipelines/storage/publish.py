"""What a training on other machines reads, put where they all see it: named by its content, so that it goes there once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath

import fsspec

from pipelines.data.shards.manifest import MANIFEST, ShardError, read_manifest
from pipelines.data.shards.stored_explanations import INDEX
from pipelines.storage.retry import in_short, make_folder, with_patience


def publish(folder: str | Path, url: str, names: Iterable[str]) -> str:
    """Copies the files `names` of a folder here to `url`, unless they are there, and returns that.

    Args:
        folder: the files; where they are at `url` already, none is needed.
        url: a place that only ever has this content.
        names: the last one is written last and tells that the others are there.

    Raises:
        ShardError: a file is neither here nor there, or the storage is not there.
        OSError: the storage does not take them.
    """
    filesystem, root = fsspec.url_to_fs(url, use_listings_cache=False)
    *others, marker = names
    try:
        if with_patience(partial(filesystem.exists, f"{root}/{marker}"), url):
            return url
        for name in (*others, marker):
            make_folder(filesystem, str(PurePosixPath(root, name).parent))
            with_patience(partial(filesystem.put_file, str(Path(folder, name)), f"{root}/{name}"), url)
    except FileNotFoundError as error:
        raise ShardError(f"{folder} cannot be put to {url}: {in_short(error)}") from None
    return url


def publish_shards(folder: str, storage: str) -> str:
    """The root, in a storage that all machines see, of the shards whose manifest is in a folder here."""
    manifest = read_manifest(folder)
    names = [shard.name for shards in manifest.splits.values() for shard in shards]
    return publish(folder, f"{storage.rstrip('/')}/shards/{manifest.digest[:16]}", [*names, MANIFEST])


def publish_explanations(folder: str, storage: str) -> str:
    """The root, in a storage that all machines see, of the stored explanations whose index is in a folder here."""
    content = Path(folder, INDEX).read_bytes()
    names = [shard["name"] for shard in json.loads(content)["shards"]]
    url = f"{storage.rstrip('/')}/explanations/{hashlib.sha256(content).hexdigest()[:16]}"
    return publish(folder, url, [*names, INDEX])


def fetch(url: str, folder: Path, names: Iterable[str]) -> None:
    """Copies the files `names` at `url` to a folder here.

    Raises:
        FileNotFoundError: one is not there.
    """
    filesystem, root = fsspec.url_to_fs(url, use_listings_cache=False)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with_patience(partial(filesystem.get_file, f"{root}/{name}", str(folder / name)), url)
