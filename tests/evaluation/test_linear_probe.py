"""Linear probes: features are the head's inputs, and heads learn linear directions."""

import math

import pytest
import torch
from torch.nn import functional as F

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.evaluation.linear_probe import evaluate_linear_probe, train_head
from pipelines.evaluation.towers import head_of, load_features
from pipelines.models import ModelSpec
from pipelines.params import ClipEvaluateParams, DataParams, LinearProbeParams
from pipelines.training import Context
from tests.support.drawn import CLASSES, drawn_shards
from tests.support.small_clip import SIDE, small_clip

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "design"),
    [("conventional", {}), ("bcos", {"b": 1.0}), ("bcos", {"b": 1.0, "gap_reorder": False})],
)
def test_features_are_what_the_head_sees(tmp_path, kind, design):
    spec = ModelSpec("resnet8", CLASSES, SIDE, kind, design={**design, "temperature": 3.0} if design else {})
    model = models.assemble(spec).eval()
    models.save(tmp_path, model, spec)
    features, _ = load_features(str(tmp_path), CPU)
    images = add_inverse(torch.rand(3, 3, SIDE, SIDE))
    head = head_of(model)[1]
    logits = F.linear(features(images), head.weight, head.bias) / (3 if design else 1) + model.logit_bias
    assert torch.allclose(logits, model(images), atol=1e-4)


def test_features_of_a_tower_are_its_embeddings(tmp_path):
    folder = small_clip(tmp_path)["bcos"]
    images = add_inverse(torch.rand(3, 3, SIDE, SIDE))
    assert torch.equal(load_features(folder, CPU)[0](images), models.load(folder)[0](images))


@pytest.mark.parametrize("head", ["linear", "bcos"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_heads_learn_directions(head, loss):
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4, 8, generator=generator), dim=1)
    labels = torch.arange(200) % 4
    features = F.normalize(directions[labels] + 0.1 * torch.randn(200, 8, generator=generator), dim=1)
    params = LinearProbeParams(epochs=10, batch_size=32)
    trained = [train_head(features, labels, 4, head, loss, params) for _ in range(2)]
    logits = [module(features) for module in trained]
    assert torch.equal(*logits)
    assert (logits[0].argmax(1) == labels).float().mean() > 0.98
    if head == "bcos":  # without a bias, features of 0 give the logit bias alone
        expected = -math.log(3) if loss == "bce" else 0.0
        assert trained[0](torch.zeros(1, 8))[0].tolist() == pytest.approx([expected] * 4)


def test_every_head_and_loss_is_measured_on_every_backbone(tmp_path):
    spec = ModelSpec("resnet8", CLASSES, SIDE, "bcos")
    models.save(tmp_path / "classifier", models.assemble(spec), spec)
    directories = {"classifier": str(tmp_path / "classifier"), **small_clip(tmp_path / "clip")}
    shards = drawn_shards(tmp_path, 10, image_size=SIDE, counts={"train": 12, "val": 2, "test": 8})
    probe = LinearProbeParams(epochs=1, heads=("linear", "bcos"), losses=("cross_entropy", "bce"))
    params, data = ClipEvaluateParams(batch_size=5, probe=probe), DataParams(image_size=SIDE, augment="none")
    found = evaluate_linear_probe(Context(), directories, shards, data, params)
    assert (found["train_images"], found["images"]) == (12, 8)
    for of_model in found["models"].values():
        assert all(
            0 <= of_model[head][loss]["accuracy"] <= 1 for head in probe.heads for loss in probe.losses
        )
