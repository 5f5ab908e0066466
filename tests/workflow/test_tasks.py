import json

import pytest

from pipelines.data.shards.manifest import MANIFEST, Manifest
from pipelines.data.shards.sample import DataError
from pipelines.workflow.tasks import check_boxes


def shards(folder, **fields):
    manifest = Manifest(("a", "b"), "multilabel", "nowhere", "0" * 64, dict.fromkeys(fields, ()), fields)
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return str(folder)


def test_a_data_set_without_boxes_cannot_guide(tmp_path):
    check_boxes(shards(tmp_path, train=("boxes",), val=("boxes",), test=()))
    with pytest.raises(DataError, match=r"guide.dataset: no image of val in .* has a box: guidance needs some"):
        check_boxes(shards(tmp_path, train=("boxes",), val=("mask",), test=("boxes",)))
