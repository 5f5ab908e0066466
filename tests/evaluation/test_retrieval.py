"""Recall@k of towers equals that of sorted similarities; all captions of an image are its own."""

import pytest
import torch
from torch.nn import functional as F

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.data.loading.loader import loader
from pipelines.data.shards.sample import DataError
from pipelines.evaluation.retrieval import evaluate_retrieval
from pipelines.params import ClipEvaluateParams, DataParams
from pipelines.training import Context
from tests.support.drawn import drawn_shards
from tests.support.loading import write
from tests.support.small_clip import SIDE, small_clip
from tests.support.toy_source import plain, rich

DATA = DataParams(image_size=SIDE, augment="none")
PARAMS = ClipEvaluateParams(batch_size=7, text_batch=5)


def by_sorting(images, texts, owners):
    similarities = images @ texts.T
    found = {}
    for k in (1, 5, 10):
        hits = owners[similarities.topk(k).indices] == torch.arange(len(images))[:, None]
        found[f"image_to_text_recall_at_{k}"] = hits.any(1).float().mean().item()
        hits = similarities.T.topk(k).indices == owners[:, None]
        found[f"text_to_image_recall_at_{k}"] = hits.any(1).float().mean().item()
    return found


def test_every_caption_of_the_split_counts(tmp_path):
    towers = small_clip(tmp_path / "clip")
    counts = {"train": 2, "val": 2, "test": 20}
    shards = drawn_shards(tmp_path, 5, image_size=SIDE, counts=counts, captions=True)
    found = evaluate_retrieval(Context(), towers, shards, DATA, PARAMS)
    (batch,) = loader(shards, "test", DATA, 20, fields=("captions",))
    owners = torch.tensor([row for row, some in enumerate(batch["captions"]) for _ in some])
    assert (found["images"], found["captions"], found["without_caption"]) == (20, len(owners), 0)
    assert len(owners) > 20
    for name, folder in towers.items():
        texts = models.load_text_tower(folder).encode([text for some in batch["captions"] for text in some])
        with torch.no_grad():
            images = F.normalize(models.load(folder)[0](add_inverse(batch["image"])), dim=1)
        assert found["models"][name] == pytest.approx(
            by_sorting(images, texts, owners), abs=0.06
        )  # at most one tie


def test_images_without_a_caption_are_counted_and_data_without_any_named(tmp_path):
    towers = small_clip(tmp_path / "clip")
    found = evaluate_retrieval(
        Context(), towers, write(tmp_path / "some", [rich(n) for n in range(9)]), DATA, PARAMS, "train"
    )
    assert (found["images"], found["captions"], found["without_caption"]) == (9, 6, 3)
    with pytest.raises(DataError, match="no image of train has a caption"):
        evaluate_retrieval(
            Context(), towers, write(tmp_path / "none", [plain(n) for n in range(9)]), DATA, PARAMS, "train"
        )
