"""Evaluation of real models on shards, on any number of workers."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pipelines import models
from pipelines.attribution import Attribution, attribute
from pipelines.bcos import add_inverse, dynamic_weights
from pipelines.data.loading.loader import loader
from pipelines.evaluation import (
    BOX_SIZES,
    ExplainedModel,
    evaluate,
    examples_by_key,
    figures,
    grid_explainer,
    knows_positions,
    load_explained_model,
)
from pipelines.evaluation.gallery import draw_gallery, explain_predicted
from pipelines.evidence import Records
from pipelines.metrics import box_masks, energy_pointing_game
from pipelines.models import ModelSpec
from pipelines.params import DataParams, EvaluateParams
from pipelines.training import Context
from tests.support.drawn import CLASSES, drawn_shards, flat, known_by_heart, untrained_on_scenes

pytestmark = pytest.mark.xdist_group("comparison")  # one xdist worker trains the models for all tests

DATA = DataParams(image_size=32, augment="none")
PARAMS = EvaluateParams(batch_size=7, grid_size=2, grid_count=6, grid_batch=4, smooth=3, pictures=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return drawn_shards(
        tmp_path_factory.mktemp("objects"), 20, image_size=32, counts={"train": 10, "val": 10, "test": 50}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    return known_by_heart(tmp_path_factory.mktemp("models"), shards, DATA)


def on_rank(rank, world_size, directories, shards, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    records = evaluate(Context(rank, world_size), directories, shards, DATA, PARAMS)
    records.save(Path(folder, str(rank)))
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_one_two_and_three_workers_find_the_same(trained, shards, tmp_path):
    # Imported once for the five processes.
    mp.get_context("forkserver").set_forkserver_preload(["pipelines.evaluation"])
    alone = figures(evaluate(Context(), trained, shards, DATA, PARAMS))
    assert alone["images"] == 50
    assert alone["grids"]["count"] == 6
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        mp.start_processes(
            on_rank, (world_size, trained, shards, folder), nprocs=world_size, start_method="forkserver"
        )
        for rank in range(world_size):
            together = figures(Records.load(folder / str(rank)))
            assert together["models"]["bcos"]["accuracy"] == alone["models"]["bcos"]["accuracy"]
            assert dict(flat(together)) == pytest.approx(dict(flat(alone)), abs=1e-6)


def test_every_image_is_counted_once_and_bcos_explains_its_logits(trained, shards):
    found = figures(evaluate(Context(), trained, shards, DATA, PARAMS))
    own = found["models"]["bcos"]["explanations"]["bcos"]
    assert own["unexplained_share"] < 1e-4 < own["unexplained_share_as_published"]
    posthoc = found["models"]["conventional"]["explanations"]
    assert set(posthoc) == {"gradcam", "input_x_gradient"}
    assert all(
        0 <= value <= 1
        for scores in (own, *posthoc.values())
        for key, value in scores.items()
        if key.endswith("gridpg")
    )
    assert not any(math.isnan(value) for _, value in flat(found))


def test_accuracy_is_that_of_the_logits(trained, shards):
    model, _ = models.load(trained["bcos"])
    (batch,) = loader(shards, "test", DATA, 50)
    with torch.no_grad():
        right = (model(add_inverse(batch["image"])).argmax(1) == batch["label"]).float().mean()
    found = figures(evaluate(Context(), trained, shards, DATA, PARAMS))
    assert found["models"]["bcos"]["accuracy"] == pytest.approx(right.item())


def test_students_are_measured_against_their_teacher(trained, shards, tmp_path):
    model, spec = models.load(trained["bcos"])
    (batch,) = loader(shards, "test", DATA, 50)
    images = add_inverse(batch["image"])
    torch.manual_seed(1)
    student = models.assemble(spec).train()
    student(images)
    models.save(tmp_path / "student", student, spec)
    directories = {"teacher": trained["bcos"], "same": trained["bcos"], "student": str(tmp_path / "student")}
    directories |= {"conventional": trained["conventional"]}
    found = figures(evaluate(Context(), directories, shards, DATA, PARAMS, "test", "teacher"))["models"]
    assert "agreement" not in found["teacher"]
    assert found["same"]["agreement"] == 1
    assert found["same"]["explanation_similarity"] == pytest.approx(1)
    targets = model(images).argmax(1)
    (_, of_teacher), (logits, of_student) = (
        dynamic_weights(each.eval(), images, targets) for each in (model, student)
    )
    cosines = nn.functional.cosine_similarity(of_student.flatten(1), of_teacher.flatten(1))
    assert found["student"]["explanation_similarity"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert found["student"]["agreement"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert -1 <= found["conventional"]["explanation_similarity"] <= 1  # both explained by GradCAM


def test_the_worst_group_is_that_of_the_logits(trained, shards):
    model, _ = models.load(trained["bcos"])
    (batch,) = loader(shards, "test", DATA, 50)
    right = (model(add_inverse(batch["image"])).argmax(1) == batch["label"]).float()
    found = figures(evaluate(Context(), {"bcos": trained["bcos"]}, shards, DATA, PARAMS))["models"]["bcos"]
    groups = batch["group"]
    by_group = [right[groups == group].mean().item() for group in groups.unique()]
    assert found["worst_group_accuracy"] == pytest.approx(min(by_group))
    assert found["mean_group_accuracy"] == pytest.approx(sum(by_group) / len(by_group))
    pairs = set(zip(batch["label"].tolist(), groups.tolist(), strict=True))
    by_pair = [right[(batch["label"] == label) & (groups == group)].mean().item() for label, group in pairs]
    assert found["worst_class_group_accuracy"] == pytest.approx(min(by_pair))


def test_pictures_are_the_same_each_time(trained, shards, tmp_path):
    right = evaluate(Context(), trained, shards, DATA, PARAMS).right("bcos")
    one = draw_gallery(tmp_path / "one", trained, right, shards, DATA, PARAMS)
    other = draw_gallery(tmp_path / "other", trained, right, shards, DATA, PARAMS)
    assert [path.name for path in one] == ["panels-00.png"]
    assert one[0].read_bytes() == other[0].read_bytes()


def test_multilabel_models_are_scored_on_every_pair(tmp_path):
    folders, shards = untrained_on_scenes(tmp_path, DATA)
    records = evaluate(Context(), folders, shards, DATA, PARAMS)
    found, right = figures(records), records.right("bcos")
    assert {"f1", "recall", "mean_average_precision"} <= set(found["models"]["bcos"])
    assert "grids" not in found
    assert len(right) == 12
    own = found["models"]["bcos"]["explanations"]["bcos"]
    assert (own["pairs_without_box"], own["pairs_with_empty_boxes"]) == (0, 0)
    sizes = [size for size in BOX_SIZES if f"pairs_{size}" in own]
    assert sum(own[f"pairs_{size}"] for size in sizes) == own["pairs"]
    for key in (
        "epg",
        "on_object_epg",
        "size_corrected_epg",
        "iou",
    ):  # weighted means over sizes give the whole
        whole = sum(own[f"{key}_{size}"] * own[f"pairs_{size}"] for size in sizes) / own["pairs"]
        assert own[key] == pytest.approx(whole)
        assert own[f"{key}_undefined"] == sum(own[f"{key}_{size}_undefined"] for size in sizes)
    assert draw_gallery(tmp_path / "pictures", folders, right, shards, DATA, PARAMS)


def test_what_was_guided_is_evaluated_too(trained, shards):
    layer = Attribution("bcos", "body.layer2")
    found = figures(evaluate(Context(), {"bcos": trained["bcos"]}, shards, DATA, PARAMS, guided=layer))[
        "models"
    ]["bcos"]
    assert list(found["explanations"]) == ["bcos", "guided"]
    assert {"accuracy", "f1", "precision", "recall", "mean_average_precision"} <= set(found)
    (batch,) = loader(shards, "test", DATA, 50)
    model, _ = models.load(trained["bcos"])
    maps = attribute(
        model, add_inverse(batch["image"]), batch["label"], method=layer.method, layer=layer.layer
    )
    expected = energy_pointing_game(maps, box_masks(batch["boxes"], batch["label"], maps.shape[-2:])).mean()
    assert found["explanations"]["guided"]["epg"] == pytest.approx(expected.item(), abs=1e-5)
    for same in (Attribution("bcos"), Attribution("gradcam")):
        models_of = {"model": trained["conventional"]}
        posthoc = figures(evaluate(Context(), models_of, shards, DATA, PARAMS, guided=same))["models"][
            "model"
        ]
        assert ("guided" in posthoc["explanations"]) == (same.method == "bcos")


def test_a_network_without_features_for_gradcam_is_evaluated_without(trained, shards, tmp_path, capsys):
    spec = models.read_spec(trained["conventional"])
    spec = replace(spec, name="timm:test_vit", options={"img_size": 32, "patch_size": 8})
    models.save(tmp_path / "vit", models.assemble(spec), spec)
    pair = {"teacher": trained["conventional"], "student": str(tmp_path / "vit")}
    found = figures(evaluate(Context(), pair, shards, DATA, PARAMS, teacher="teacher"))["models"]["student"]
    assert set(found["explanations"]) == {"input_x_gradient"}
    assert "explanation_similarity" not in found
    assert 0 <= found["agreement"] <= 1
    assert "has no convolutional features" in capsys.readouterr().out
    alone = PARAMS.model_copy(update={"posthoc": ("gradcam",)})
    bare = figures(evaluate(Context(), pair, shards, DATA, alone, teacher="teacher"))["models"]["student"]
    assert (bare["explanations"], bare["accuracy"]) == ({}, found["accuracy"])


def test_pictures_show_what_was_guided(trained):
    explained = load_explained_model(
        trained["bcos"], (), torch.device("cpu"), Attribution("bcos", "body.layer2")
    )
    columns = explain_predicted("bcos", explained, add_inverse(torch.rand(2, 3, 32, 32)), smooth=3)
    assert [column.titles[0].split("\n")[1] for column in columns] == ["weights", "contributions", "guided"]


def test_pictures_name_the_predicted_class_with_its_logit_and_probability(trained):
    explained = load_explained_model(trained["bcos"], (), torch.device("cpu"))
    images = add_inverse(torch.rand(2, 3, 32, 32))
    logits = explained.model(images)
    column = explain_predicted("bcos", explained, images, smooth=3)[-1]
    for row, (values, title) in enumerate(zip(logits, column.titles, strict=True)):
        target = int(values.argmax())
        wanted = f"{CLASSES[target]} {values[target]:+.2f} ({values.softmax(0)[target]:.0%})"
        assert title.split("\n") == ["bcos", "contributions", wanted], row
    assert column.contributions


def test_examples_are_found_by_key_with_their_exact_pixels(shards):
    read = partial(loader, shards, "test", DATA, 8)
    images = {key: image for batch in read() for key, image in zip(batch["key"], batch["image"], strict=True)}
    found = examples_by_key(read, set(list(images)[3:40:9]))
    assert len(found) == 5
    assert all(torch.equal(example.image / 255, images[key]) for key, example in found.items())
    # Examples do not keep their whole batches in memory.
    assert all(example.image.untyped_storage().nbytes() == 3 * 32 * 32 for example in found.values())


def test_grids_of_a_vit_are_explained_in_windows_of_its_image_size():
    torch.manual_seed(0)
    images, classes = add_inverse(torch.rand(2, 3, 64, 64)), torch.tensor([[0, 1, 2, 3]] * 2)
    spec = ModelSpec("timm:test_vit", tuple("abcd"), 32, "bcos", options={"img_size": 32, "patch_size": 8})
    explained, seen = ExplainedModel(models.assemble(spec).eval(), spec, {}), []
    explained.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[1:])))
    maps = grid_explainer(explained, Attribution("bcos"))(images, classes)
    assert maps.shape == (2, 4, 64, 64)
    assert (maps.abs().amax((2, 3)) > 0).all()
    assert set(seen) == {(6, 32, 32)}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("timm:test_vit", {}, True),
        ("simple_vit_ti", {"depth": 1}, True),
        ("torchvision:vit_b_16", {}, True),
        ("timm:test_resnet", {}, False),
        ("torchvision:swin_t", {}, False),
        ("resnet8", {}, False),
    ],
)
def test_which_networks_know_positions(name, options, expected):
    with torch.device("meta"):
        assert knows_positions(models.build(name, options=options)) is expected
