"""Shards and stored explanations in a storage that all machines see, in folders named by content."""

from __future__ import annotations

from pathlib import Path

from pipelines.data.shards.manifest import MANIFEST, ShardError, read_manifest
from pipelines.data.shards.stored_explanations import INDEX, read_index, shard_files
from pipelines.storage import files
from pipelines.storage.publish import publish


def publish_shards(folder: str, storage: str) -> str:
    """Copies the shards of a manifest in a local folder to `storage` if missing; returns their root."""
    manifest = read_manifest(folder)
    names = [shard.name for shards in manifest.splits.values() for shard in shards]
    names += [index.name for index in manifest.indexes.values()]
    return publish(folder, f"{storage.rstrip('/')}/shards/{manifest.digest[:16]}", [*names, MANIFEST])


def publish_explanations(folder: str, storage: str) -> str:
    """The root of the stored explanations whose index is in a local folder: at a URL, or copied to `storage` if missing there.

    Raises:
        ShardError: the explanations are not where the index says.
    """
    index = read_index(folder)
    if "root" in index:
        url = index["root"]
        if files.read_json(f"{url}/{INDEX}") != index:
            raise ShardError(f"{folder}/{INDEX}: its explanations are no longer at {url}: run the stage `explain` again")
        return url
    url = f"{storage.rstrip('/')}/explanations/{files.file_digest(Path(folder, INDEX))[:16]}"
    return publish(folder, url, shard_files(index))
