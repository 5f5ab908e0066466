"""Shards and stored explanations in a storage that all machines see, in folders named by content."""

from __future__ import annotations

from pathlib import Path

from pipelines.data.shards.manifest import MANIFEST, read_manifest
from pipelines.data.shards.stored_explanations import INDEX, read_index
from pipelines.storage.files import file_digest
from pipelines.storage.publish import Upload


def publish_shards(folder: str, storage: str) -> str:
    """Copies the shards of a manifest in a local folder to `storage` if missing; returns their root."""
    return shards_upload(folder, storage).run()


def shards_upload(folder: str, storage: str) -> Upload:
    """The shards of a manifest in a local folder, and where in `storage` they belong."""
    manifest = read_manifest(folder)
    sizes = {shard.name: shard.bytes for shards in manifest.splits.values() for shard in shards}
    return Upload(folder, f"{storage.rstrip('/')}/shards/{manifest.digest[:16]}", (*sizes, MANIFEST), sizes)


def publish_explanations(folder: str, storage: str) -> str:
    """Copies the stored explanations of an index in a local folder to `storage` if missing; returns their root."""
    return explanations_upload(folder, storage).run()


def explanations_upload(folder: str, storage: str) -> Upload:
    """The stored explanations of an index in a local folder, and where in `storage` they belong."""
    sizes = {shard["name"]: shard["bytes"] for shard in read_index(folder)["shards"]}
    url = f"{storage.rstrip('/')}/explanations/{file_digest(Path(folder, INDEX))[:16]}"
    return Upload(folder, url, (*sizes, INDEX), sizes)
