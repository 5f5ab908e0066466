"""Guidance: drawing of classes, the loss and its gradient, metrics of pairs of image and class."""

from functools import partial

import pytest
import torch
from torch import nn

from pipelines import models
from pipelines.attribution import attribute, explain, explain_pairs
from pipelines.bcos import add_inverse, bcosify
from pipelines.distributed import to_device
from pipelines.losses import energy_loss, size_corrected_energy_loss
from pipelines.methods import (
    Guidance,
    ObjectClassification,
    build_classifier,
    build_guidance,
    classifier_spec,
)
from pipelines.methods.guidance import LOCALISATION, dilated, draw_classes
from pipelines.metrics import box_masks, measured
from pipelines.models import ModelError, ModelSpec
from pipelines.params import GuidanceParams, TrainingParams
from pipelines.training.job import directions
from pipelines.training.objective import build_objective
from tests.support.method_params import method_params

CLASSES, SIDE = 4, 8


def network(kind="bcos", classes=CLASSES):
    torch.manual_seed(0)
    ordinary = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    return bcosify(ordinary) if kind == "bcos" else models.ConventionalNetwork(ordinary)


def params(**changes):
    return method_params(GuidanceParams, **{"batch_size": 4, "localisation_weight": 0.5, **changes})


def batch(count=4):
    """Returns images with two labels each and one box per label; neighbouring images have other labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.zeros(count, CLASSES)
    boxes = []
    for row in range(count):
        chosen = (row % CLASSES, (row + 1) % CLASSES)
        labels[row, list(chosen)] = 1
        boxes += [[row, chosen[0], 1, 1, 5, 4], [row, chosen[1], 2, 3, 7, 8]]
    images = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    return {
        "key": [f"k{row}" for row in range(count)],
        "image": images,
        "labels": labels,
        "boxes": torch.tensor(boxes).float(),
    }


def method(kind="bcos", annotated=None, **changes):
    return Guidance(network(kind), "multilabel", CLASSES, params(**changes), annotated)


# What is drawn ----------------------------------------------------------------------------------------------


def test_each_label_of_an_image_is_drawn_equally_often_and_no_other_class():
    torch.manual_seed(0)
    targets = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0]])
    drawn = torch.stack([draw_classes(targets) for _ in range(3000)])
    counts = torch.bincount(drawn[:, 0], minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]].double() / 3000 - 1 / 3).abs().max() < 0.04
    assert (drawn[:, 1] == 1).all()


def test_the_draw_is_that_of_multinomial():
    targets = (torch.rand(50, 7, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    targets[:, 0] = 1
    torch.manual_seed(0)
    drawn = draw_classes(targets)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.multinomial(targets, 1)[:, 0])


def test_the_mask_is_the_union_of_the_boxes_of_the_class_that_was_drawn():
    torch.manual_seed(3)
    prepared = method().prepare(batch())
    expected = box_masks(batch()["boxes"], prepared["class"], (SIDE, SIDE))
    assert torch.equal(prepared["mask"], expected)
    assert expected.flatten(1).any(1).all()


def test_images_without_labels_and_without_annotation_are_not_guided_but_classified():
    some = batch()
    some["labels"][0] = 0
    prepared = method(annotated=["k0", "k1"]).prepare(some)
    assert prepared["mask"].flatten(1).any(1).tolist() == [False, True, False, False]
    assert len(prepared["target"]) == 4
    assert "mask" not in method(annotated=["other"]).prepare(some)
    without = method(annotated=["other"])
    losses = without.loss(without.module, without.prepare(some))
    plain = ObjectClassification(without.module, "multilabel", CLASSES)
    assert losses["loss"] == plain.loss(plain.module, plain.prepare(some))["loss"]


def test_prepare_never_asks_a_device_for_values():
    # Tensors on the meta device have no values, so code that would wait for a GPU raises an error.
    there = to_device(batch(), torch.device("meta"))
    assert {name: value.device.type for name, value in there.items() if name != "key"} == {
        "image": "meta",
        "labels": "meta",
        "boxes": "cpu",
    }
    prepared = method(annotated=["k0", "k2"], dilation=0.1).prepare(there)
    assert prepared["mask"].shape == (4, SIDE, SIDE)
    assert prepared["mask"].is_meta


def test_boxes_of_images_without_labels_move_nothing():
    some = batch()
    some["labels"][:] = 0
    guided = method()
    prepared = guided.prepare(some)
    assert not prepared["mask"].any()
    losses = guided.loss(guided.module, prepared)
    assert losses["localisation"] == 0
    assert losses["loss"] == losses["classification"]


def test_boxes_move_out_by_whole_pixels_up_to_the_border():
    boxes = torch.tensor([[0.0, 2, 10, 20, 31, 60], [3, 1, 0, 0, 100, 50]])
    assert dilated(boxes, 0.1, (64, 100)).tolist() == [[0, 2, 8, 16, 33, 64], [3, 1, 0, 0, 100, 55]]
    assert torch.equal(dilated(boxes, 0.0, (64, 100)), boxes)


# The loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCALISATION)
def test_the_loss_is_classification_and_the_sum_over_the_guided_images(name):
    torch.manual_seed(0)
    guidance = method(loss=name, annotated=["k0", "k2", "k3"])
    prepared = guidance.prepare(batch())
    losses = guidance.loss(guidance.module, prepared)
    maps = attribute(guidance.module, prepared["image"], prepared["class"], create_graph=True)
    each = LOCALISATION[name](maps, prepared["mask"])[[0, 2, 3]]
    torch.testing.assert_close(losses["loss"], losses["classification"] + 0.5 * each.sum())
    torch.testing.assert_close(losses["localisation"], each.sum() / 4)


def test_alpha_is_that_of_the_size_corrected_loss():
    torch.manual_seed(0)
    plain, corrected = method(), method(loss="size_corrected_energy", alpha=0.25)
    prepared = plain.prepare(batch())
    maps = attribute(corrected.module, prepared["image"], prepared["class"])
    each = size_corrected_energy_loss(maps, prepared["mask"], 0.25)
    torch.testing.assert_close(corrected.loss(corrected.module, prepared)["localisation"], each.mean())
    nothing = method(loss="size_corrected_energy", alpha=0)
    torch.testing.assert_close(nothing.loss(nothing.module, prepared), plain.loss(plain.module, prepared))


@pytest.mark.parametrize("weight", [0, 0.5])
def test_the_losses_by_which_an_epoch_can_be_selected_are_those_that_there_are(weight):
    guidance = method(localisation_weight=weight)
    losses = guidance.loss(guidance.module, guidance.prepare(batch()))
    assert set(losses) == set(guidance.losses)
    known = directions(guidance)
    assert known["val/iou"] is known["val/iou_at_0.5"] is True
    assert known["val/iou_threshold"] is None
    assert {known[f"train/{name}"] for name in losses} == {False}


@pytest.mark.parametrize("images", [4, 7, 64])
def test_the_sum_is_over_the_images_of_the_step_whatever_the_batch_size_is(images):
    torch.manual_seed(0)
    guidance = method(batch_size=64)
    # 4 of the images are on this rank.
    prepared = guidance.prepare({**batch(), "step_images": torch.tensor(float(images))})
    losses = guidance.loss(guidance.module, prepared)
    torch.testing.assert_close(
        losses["loss"], losses["classification"] + 0.5 * images * losses["localisation"]
    )


def test_a_batch_without_boxes_has_a_localisation_of_0_so_that_the_epochs_mean_is_over_all_images():
    guided, plain = method(annotated=["other"]), method(annotated=["other"], localisation_weight=0)
    assert guided.loss(guided.module, guided.prepare(batch()))["localisation"] == 0
    assert "localisation" not in plain.loss(plain.module, plain.prepare(batch()))


def test_parts_of_a_batch_add_up_to_the_whole():
    torch.manual_seed(0)
    guidance = method()
    guidance.module.eval()
    prepared = guidance.prepare(batch())
    whole = guidance.loss(guidance.module, prepared)["loss"]
    parts = [{key: value[rows] for key, value in prepared.items()} for rows in (slice(0, 1), slice(1, 4))]
    shares = [guidance.loss(guidance.module, part)["loss"] * len(part["image"]) / 4 for part in parts]
    torch.testing.assert_close(sum(shares), whole)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bcos", {}),
        ("bcos", {"layer": "body.3", "loss": "l1"}),
        ("conventional", {"attribution": "input_x_gradient", "loss": "rrr"}),
        ("conventional", {"attribution": "gradcam", "layer": "network.3", "loss": "energy"}),
        ("conventional", {"attribution": "integrated_gradients", "loss": "energy"}),
        ("bcos", {"loss": "ppce"}),
        ("bcos", {"loss": "size_corrected_energy"}),
    ],
)
def test_the_gradient_of_the_whole_loss_is_that_of_finite_differences(kind, options):
    torch.manual_seed(0)
    guidance = method(kind, **options)
    module = guidance.module.double().train()
    prepared = {k: v.double() if v.is_floating_point() else v for k, v in guidance.prepare(batch()).items()}

    for layer in module.modules():
        if hasattr(layer, "momentum"):
            # Integrated gradients use the running statistics, which must not change with the weights.
            layer.momentum = 0

    def loss():
        return guidance.loss(module, prepared)["loss"]

    weights = [p for p in module.parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(loss(), weights)
    generator = torch.Generator().manual_seed(2)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            above = loss().item()
            weight.sub_(direction, alpha=2 * step)
            below = loss().item()
            weight.add_(direction, alpha=step)
        assert (above - below) / (2 * step) == pytest.approx(
            (gradient * direction).sum().item(), rel=2e-4, abs=1e-7
        )


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"layer": "body.3"}])
def test_compiled_it_is_the_same(options):
    torch.compiler.reset()
    torch.manual_seed(0)
    eager, compiled = method(**options), method(**options)
    compiled.module.load_state_dict(eager.module.state_dict())
    prepared = eager.prepare(batch())
    objective = build_objective(compiled, TrainingParams(workers=0, compile=True))
    ours, theirs = objective(prepared)["loss"], eager.loss(eager.module, prepared)["loss"]
    torch.testing.assert_close(ours, theirs)
    of_compiled = torch.autograd.grad(ours, list(compiled.module.parameters()))
    of_eager = torch.autograd.grad(theirs, list(eager.module.parameters()))
    for one, other in zip(of_compiled, of_eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_guidance_moves_the_explanation_into_the_boxes():
    torch.manual_seed(0)
    guidance = method(localisation_weight=1.0)
    guidance.module.train()
    optimiser = torch.optim.Adam(guidance.module.parameters(), 0.01)

    def inside():
        images, drawn = add_inverse(batch()["image"]), batch()["labels"].argmax(1)
        maps = attribute(guidance.module.eval(), images, drawn)
        return energy_loss(maps, box_masks(batch()["boxes"], drawn, (SIDE, SIDE))).mean()

    before = inside()
    guidance.module.train()
    for _ in range(40):
        optimiser.zero_grad()
        guidance.loss(guidance.module, guidance.prepare(batch()))["loss"].backward()
        optimiser.step()
    assert inside() < before - 0.1


# Pairs ------------------------------------------------------------------------------------------------------


def test_pairs_are_explained_as_one_backward_pass_each_would():
    model = network().eval()
    present = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1]]).bool()
    images = add_inverse(torch.rand(5, 3, SIDE, SIDE))
    logits, maps = explain_pairs(partial(explain, model), images, present)
    rows, classes = present.nonzero(as_tuple=True)
    torch.testing.assert_close(logits, model(images))
    assert len(maps) == 9
    for row, label, found in zip(rows, classes, maps, strict=True):
        torch.testing.assert_close(
            found, attribute(model, images[row, None], label[None])[0], rtol=1e-5, atol=1e-7
        )


def test_an_image_of_twenty_classes_and_none_at_all():
    model = network(classes=20).eval()
    present = torch.stack([torch.ones(20), torch.zeros(20)]).bool()
    logits, maps = explain_pairs(partial(explain, model), add_inverse(torch.rand(2, 3, SIDE, SIDE)), present)
    assert (logits.shape, maps.shape) == ((2, 20), (20, SIDE, SIDE))
    nothing = explain_pairs(
        partial(explain, model), add_inverse(torch.rand(2, 3, SIDE, SIDE)), present[[1, 1]]
    )
    assert nothing[1].shape == (0, SIDE, SIDE)


def test_metrics_are_those_of_the_pairs_with_a_box():
    guidance = method()
    guidance.module.eval()
    some = batch()
    some["boxes"] = torch.cat([some["boxes"][:3], some["boxes"][4:]])  # image 1 loses a box
    metrics = guidance.metrics()
    guidance.update(metrics, guidance.module, some)
    assert metrics["epg"].count == metrics["iou"].count == 7
    found = metrics.compute()
    assert set(found) == {"f1", "precision", "recall", "epg", "iou", "iou_threshold", "iou_at_0.5"}
    assert all(0 <= value <= 1 for value in measured(found).values())
    assert found["iou"] >= found["iou_at_0.5"]


@pytest.mark.parametrize("boxes", [[], [0, 1, 6], [0, 2, 4, 6]])
def test_only_pairs_with_a_box_are_explained_and_only_they_have_a_graph(monkeypatch, boxes):
    guidance, some, graphs = method(), batch(), []
    guidance.module.eval()
    some["boxes"] = some["boxes"][boxes]
    guidance.module.register_forward_hook(
        lambda module, args, logits: graphs.append((len(logits), logits.requires_grad))
    )
    metrics = guidance.metrics()
    with torch.no_grad():
        guidance.update(metrics, guidance.module, some)
    with_box = len({int(box[0]) for box in some["boxes"]})
    assert sum(count for count, graph in graphs if graph) == with_box
    assert sum(count for count, graph in graphs if not graph) == 4 - with_box
    assert metrics["epg"].count == len(boxes)
    alone = ObjectClassification(guidance.module, "multilabel", CLASSES)
    expected = alone.metrics()
    alone.update(expected, guidance.module, some)
    assert metrics["f1"].compute() == expected["f1"].compute()


def test_one_label_an_image_is_classified_by_as_many_decisions_and_judged_by_accuracy_too():
    guidance = Guidance(network(), "multiclass", CLASSES, params())
    guidance.module.eval()
    some = {**batch(), "label": torch.tensor([0, 1, 2, 3])}
    prepared = guidance.prepare(some)
    assert torch.equal(prepared["target"], torch.eye(4))
    assert torch.equal(prepared["class"], some["label"])
    metrics = guidance.metrics()
    guidance.update(metrics, guidance.module, some)
    right = (guidance.module(add_inverse(some["image"])).argmax(1) == some["label"]).float().mean()
    assert metrics.compute()["accuracy"] == right


# Building ---------------------------------------------------------------------------------------------------


def saved(folder, kind="bcos", classes=("a", "b", "c")):
    spec = ModelSpec("resnet8", classes, 16, kind)
    torch.manual_seed(5)
    models.save(folder, models.assemble(spec), spec)
    return folder


@pytest.mark.parametrize("kind", ["bcos", "conventional"])
def test_a_classifier_has_the_backbones_weights_and_logit_bias_and_a_new_head(tmp_path, kind):
    backbone = saved(tmp_path / "backbone", kind)
    old, _ = models.load(backbone)
    spec = classifier_spec(backbone, ("a", "b", "c"), "multilabel", 32)
    new = build_classifier(spec, backbone, seed=7).module
    assert new.logit_bias == old.logit_bias
    differing = [
        key for key, value in new.state_dict().items() if not torch.equal(value, old.state_dict()[key])
    ]
    assert [key for key in differing if ".linear." not in key] == []
    assert differing
    wider = classifier_spec(backbone, tuple("abcdefgh"), "multilabel", 32)
    assert build_classifier(wider, backbone, seed=7).module(torch.rand(2, 6, 32, 32)).shape == (2, 8)
    assert models.assemble(wider).logit_bias == old.logit_bias


def test_what_cannot_be_guided_is_said_before_training(tmp_path):
    bcos, conventional = saved(tmp_path / "b"), saved(tmp_path / "c", "conventional")
    with pytest.raises(ModelError, match=r"^layer: .* has no layer 'body.layer33'; near it: body.layer3"):
        build_guidance(bcos, params(layer="body.layer33"))
    with pytest.raises(
        ModelError,
        match=r"^attribution: a conventional network has no dynamic weights: choose input_x_gradient",
    ):
        build_guidance(conventional, params())
    with pytest.raises(ModelError, match=r"^layer: .* not \(N, C, h, w\)"):
        build_guidance(bcos, params(layer="body.linear"))
    assert build_guidance(conventional, params(attribution="gradcam")).attribution.layer.startswith(
        "network.layer3"
    )
