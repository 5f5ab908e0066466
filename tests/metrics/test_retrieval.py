"""Recall@k of images by texts and of texts by images."""

import math

import pytest
import torch

from pipelines.metrics import Recall, higher_is_better, retrieval
from pipelines.metrics.retrieval import ranks_of_best


def recalls(images, texts, owners=None):
    metric = Recall(images.shape[1])
    metric.update(images, texts, owners)
    return {name: float(value) for name, value in metric.compute().items()}


def test_by_hand_with_several_captions_an_image():
    images = torch.eye(12)[:, :12]
    # Texts of images 0, 1, 2, 3 and 0. The fourth equals image 5 and not its own image.
    texts = torch.cat([images[:3], images[5:6], images[:1]])
    found = recalls(images, texts, torch.tensor([0, 1, 2, 3, 0]))
    assert found["image_to_text_recall_at_1"] == pytest.approx(3 / 4)  # images 4 to 11 have no text
    assert found["image_to_text_recall_at_5"] == pytest.approx(1)
    assert found["text_to_image_recall_at_1"] == pytest.approx(4 / 5)
    assert found["text_to_image_recall_at_10"] == pytest.approx(4 / 5)  # eleven other images are as near


def test_it_is_the_share_whose_sorted_list_begins_with_its_own(monkeypatch):
    monkeypatch.setattr(retrieval, "ROWS", 7)
    torch.manual_seed(0)
    images, texts, owners = torch.randn(40, 3), torch.randn(100, 3), torch.randint(40, (100,))
    found = recalls(images, texts, owners)
    order = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=2).argsort(
        1, descending=True
    )
    described = [image for image in range(40) if (owners == image).any()]
    for top in (1, 5, 10):
        hits = [bool((owners[order[image, :top]] == image).any()) for image in described]
        assert found[f"image_to_text_recall_at_{top}"] == pytest.approx(sum(hits) / len(hits))


def test_the_order_of_texts_and_of_batches_changes_nothing():
    torch.manual_seed(0)
    images, texts, owners = torch.randn(30, 4), torch.randn(50, 4), torch.randint(30, (50,))
    whole = recalls(images, texts, owners)
    order = torch.randperm(50)
    assert recalls(images, texts[order], owners[order]) == pytest.approx(whole)
    metric = Recall(4)
    for start in (0, 10, 20):
        own = (owners >= start) & (owners < start + 10)
        metric.update(images[start : start + 10], texts[own], owners[own] - start)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(whole)


def test_embeddings_that_are_all_the_same_find_nothing():
    assert set(recalls(torch.ones(20, 4), torch.ones(20, 4)).values()) == {0}


def test_over_nothing_nothing_is_measured():
    assert all(math.isnan(value) for value in Recall(4).compute().values())
    assert len(ranks_of_best(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))) == 0


def test_every_figure_rises():
    assert all(higher_is_better(f"val/{name}") for name in Recall.figures)
