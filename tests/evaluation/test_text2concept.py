"""Text2Concept: the map is the least-squares fit; features that equal the embeddings give the tower."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.data.loading.loader import loader
from pipelines.data.shards.sample import DataError
from pipelines.evaluation.text2concept import evaluate_text2concept, fit_map, with_map
from pipelines.evaluation.towers import load_features
from pipelines.models import ModelError, ModelSpec
from pipelines.params import ClipEvaluateParams, DataParams
from pipelines.training import Context
from tests.support.drawn import CLASSES, drawn_shards
from tests.support.loading import write
from tests.support.small_clip import SIDE, WIDTH, small_clip
from tests.support.toy_source import plain

DATA = DataParams(image_size=SIDE, augment="none")
PARAMS = ClipEvaluateParams(batch_size=7, templates="plain")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return drawn_shards(
        tmp_path_factory.mktemp("objects"), 20, image_size=SIDE, counts={"train": 100, "val": 2, "test": 12}
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("classifier"), ModelSpec("resnet8", CLASSES, SIDE, "bcos")
    torch.manual_seed(0)
    models.save(folder, models.assemble(spec), spec)
    return str(folder)


def test_the_map_is_that_of_least_squares(towers, shards, classifier):
    features, tower = load_features(classifier, torch.device("cpu"))[0], models.load(towers["original"])[0]
    weight, share = fit_map(Context(), (features, 64), (tower, WIDTH), shards, DATA, 7, "train")
    (batch,) = loader(shards, "train", DATA, 100)
    images = add_inverse(batch["image"])
    with torch.no_grad():
        of_images, wanted = features(images).double(), F.normalize(tower(images).double(), dim=1)
    errors = [
        (of_images @ each - wanted).square().sum().item()
        for each in (weight.double(), torch.linalg.pinv(of_images) @ wanted)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert share == pytest.approx(1 - errors[0] / 100, abs=1e-3)
    with torch.no_grad():
        assert torch.allclose(
            with_map(classifier, weight)(images).double(), of_images @ weight.double(), rtol=1e-3, atol=1e-5
        )


class _Unit(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, images):
        return F.normalize(self.tower(images), dim=1)


def test_features_that_are_the_embeddings_need_no_map(towers, shards):
    tower = models.load(towers["bcos"])[0]
    weight, share = fit_map(Context(), (_Unit(tower), WIDTH), (tower, WIDTH), shards, DATA, 7, "train")
    assert share == pytest.approx(1)
    (batch,) = loader(shards, "test", DATA, 12)
    embeddings = _Unit(tower)(add_inverse(batch["image"]))
    assert torch.allclose(embeddings @ weight, embeddings, atol=1e-3)


def test_image_towers_are_refused(towers, shards):
    with pytest.raises(ModelError, match="takes a B-cos classifier"):
        evaluate_text2concept(Context(), {"tower": towers["bcos"]}, towers["bcos"], shards, DATA, PARAMS)


def test_zero_shot_and_localisation_are_measured_where_the_data_allow(towers, shards, classifier, tmp_path):
    found = evaluate_text2concept(Context(), {"bcos": classifier}, towers["original"], shards, DATA, PARAMS)
    assert 0 <= found["alignment"]["bcos"] <= 1
    assert 0 <= found["zero_shot"]["models"]["bcos"]["accuracy"] <= 1
    own = found["text_localisation"]["models"]["bcos"]["bcos"]
    assert own["unexplained_share"] < 1e-4  # contributions sum to the cosine, because the map has no bias
    assert 0 <= own["epg"] <= 1
    bare = [plain(number) for number in range(4)]
    without = evaluate_text2concept(
        Context(), {}, towers["original"], write(tmp_path / "a", bare), DATA, PARAMS, "train"
    )
    assert set(without) == {"alignment", "zero_shot"}
    unlabelled = write(tmp_path / "b", bare, task="unlabelled")
    with pytest.raises(DataError, match="neither single labels nor boxes"):
        evaluate_text2concept(
            Context(), {"bcos": classifier}, towers["original"], unlabelled, DATA, PARAMS, "train"
        )
