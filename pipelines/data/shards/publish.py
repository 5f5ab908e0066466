"""Uploads shards and stored explanations to a shared storage, in folders named by their content."""

from __future__ import annotations

from pathlib import Path

from pipelines.data.shards.manifest import MANIFEST, ShardError, read_manifest
from pipelines.data.shards.stored_explanations import INDEX, read_index, shard_files
from pipelines.storage.files import file_digest, read_json
from pipelines.storage.publish import Upload


def publish_shards(folder: str, storage: str) -> str:
    """Copies the shards of the manifest in `folder` to `storage` if missing; returns their root there."""
    return shards_upload(folder, storage).run()


def shards_upload(folder: str, storage: str) -> Upload:
    """The upload of the shards of the manifest in `folder` to `storage`.

    If tars are read in place, only indexes and manifest are uploaded.
    """
    manifest = read_manifest(folder)
    shards = (shard for of_split in manifest.splits.values() for shard in of_split)
    listed = (*(shards if manifest.tars is None else ()), *manifest.indexes.values())
    sizes = {file.name: file.bytes for file in listed}
    return Upload(folder, f"{storage.rstrip('/')}/shards/{manifest.digest[:16]}", (*sizes, MANIFEST), sizes)


def publish_explanations(folder: str, storage: str) -> str:
    """Copies explanations indexed in `folder` to `storage` unless they are at a URL; returns their root."""
    return explanations_upload(folder, storage).run()


def explanations_upload(folder: str, storage: str) -> Upload:
    """The upload of the explanations indexed in `folder` to the URL in their index, else to `storage`.

    Raises:
        ShardError: the explanations are not at the URL that the index names.
    """
    index = read_index(folder)
    if "root" in index:
        url = index["root"]
        if read_json(f"{url}/{INDEX}") != index:
            raise ShardError(
                f"{folder}/{INDEX}: its explanations are no longer at {url}: run the stage `explain` again"
            )
        return Upload(folder, url, (INDEX,))
    sizes = {shard["name"]: shard["bytes"] for shard in index["shards"]}
    url = f"{storage.rstrip('/')}/explanations/{file_digest(Path(folder, INDEX))[:16]}"
    return Upload(folder, url, tuple(shard_files(index)), sizes)
