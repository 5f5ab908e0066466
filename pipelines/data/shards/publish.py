"""Shards and stored explanations in a storage that all machines see, in folders named by content."""

from __future__ import annotations

from pathlib import Path

from pipelines.data.shards.manifest import MANIFEST, read_manifest
from pipelines.data.shards.stored_explanations import INDEX, read_index
from pipelines.storage.files import file_digest
from pipelines.storage.publish import publish


def publish_shards(folder: str, storage: str) -> str:
    """Copies the shards of a manifest in a local folder to `storage` if missing; returns their root."""
    manifest = read_manifest(folder)
    names = [shard.name for shards in manifest.splits.values() for shard in shards]
    return publish(folder, f"{storage.rstrip('/')}/shards/{manifest.digest[:16]}", [*names, MANIFEST])


def publish_explanations(folder: str, storage: str) -> str:
    """Copies the stored explanations of an index in a local folder to `storage` if missing; returns their root."""
    names = [shard["name"] for shard in read_index(folder)["shards"]]
    url = f"{storage.rstrip('/')}/explanations/{file_digest(Path(folder, INDEX))[:16]}"
    return publish(folder, url, [*names, INDEX])
