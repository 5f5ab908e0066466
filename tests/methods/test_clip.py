"""B-cosification of an image tower, and two towers trained on captions, in parts and on several ranks."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from benchmarks.harness import peak_bytes
from pipelines import losses, models
from pipelines.bcos import add_inverse, layer_b
from pipelines.methods import ImageTextTraining, build_clip, build_image_text, check_equal_shares
from pipelines.methods.method import Method
from pipelines.models import ModelError
from pipelines.params import (
    DataParams,
    ImageTextParams,
    ModelParams,
    NetworkParams,
    ParamsError,
    TrainingParams,
)
from pipelines.training import Context, train
from pipelines.training.job import directions
from pipelines.training.objective import Objective
from tests.support import toy_tower
from tests.support.clip import RN, TEXT, VIT
from tests.support.method_params import method_params
from tests.support.toy_tower import (
    CLASSES,
    COUNT,
    SIDE,
    WIDTH,
    ToyTower,
    batch_of,
    clip_params,
    images_of,
    job_of,
    pair,
    step,
    taught,
)


def embeddings(seed: int, rows: int, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def captioned(**values: Any) -> ImageTextParams:
    return method_params(ImageTextParams, **{"epochs": 3, "batch_size": COUNT, "lr": 0.1, **values})


# Ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_of_several_ranks_is_the_step_of_one_on_all_images(tmp_path: Path, world_size: int) -> None:
    images, texts, owners = embeddings(1, 30), embeddings(2, 41), torch.arange(41) * 30 // 41
    mp.get_context("forkserver").set_forkserver_preload(
        ["pipelines.evaluation", "tests.support.toy_tower", "open_clip.loss"]
    )
    arguments = (world_size, str(tmp_path), (images, texts, owners))
    mp.start_processes(toy_tower.on_rank, arguments, nprocs=world_size, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for name, (job, shares) in toy_tower.all_cases(world_size).items():
        whole = job_of(job.build, job.params)
        rows = sum(shares)
        loss, gradient = step(Context(), whole, range(rows))
        together = sum(share * found[name][0] for share, found in zip(shares, ranks, strict=True)) / rows
        assert together == pytest.approx(loss, rel=1e-5), name
        for found in ranks:
            difference = (found[name][1] - gradient).norm() / gradient.norm()
            assert difference < 1e-5, name
    for rank, found in enumerate(ranks):
        rows, first = found["rows"]
        assert first == rank * world_size
        wanted = torch.cat(
            [
                F.pad(torch.full((each, 2), float(each)), (0, 0, 0, world_size - each))
                for each in range(world_size)
            ]
        )
        assert torch.equal(rows, wanted)
        assert found["recall"] == pytest.approx(
            toy_tower.recall_on_rank(Context(), images, texts, owners), abs=1e-9
        )


def test_in_parts_the_negatives_are_still_those_of_the_whole_batch() -> None:
    optim = clip_params()
    loss, gradient = step(Context(), job_of(partial(taught, optim), optim), range(COUNT))
    in_parts, accumulated = step(Context(), job_of(partial(taught, optim), optim, accumulate=5), range(COUNT))
    assert in_parts == pytest.approx(loss, rel=1e-6)
    assert (accumulated - gradient).norm() < 1e-5 * gradient.norm()
    method = taught(optim)
    prepared = method.prepare(batch_of(range(COUNT)))
    assert loss == pytest.approx(
        losses.siglip_loss(method.module(prepared["image"]), prepared["target"], 10, -10).item()
    )


def test_memory_grows_with_the_rows_of_a_rank_not_with_all_targets() -> None:
    rows, width = 256, 16
    peaks = []
    for ranks in (2, 16):
        features, targets = embeddings(1, rows, width).requires_grad_(), embeddings(2, rows * ranks, width)
        own = torch.arange(rows) + rows
        peaks.append(
            peak_bytes(
                lambda f=features, t=targets, o=own: losses.siglip_loss(f, t, 10.0, -10.0, o).backward()
            )
        )
    assert peaks[0] == peaks[1]
    assert peaks[0] < 8 * 4 * rows * rows


@pytest.mark.parametrize("which", ["siglip of a tower", "clip", "siglip"])
def test_compiled_the_loss_and_its_gradient_stay(which: Any) -> None:
    torch.compiler.reset()
    method: Method = taught(clip_params()) if which == "siglip of a tower" else pair(captioned(loss=which))
    batch = method.prepare(batch_of(range(COUNT)))
    if "target" in batch:
        batch |= {"all_target": batch["target"].flip(0), "row": torch.arange(COUNT).flip(0)}
    objective = Objective(method)
    found = []
    for run in (objective, torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")):
        method.module.zero_grad()
        loss = run(batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in method.module.parameters())])
    torch.testing.assert_close(found[0], found[1])


# B-cosification of an image tower ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["siglip", "cosine", "info_nce"])
def test_the_student_comes_near_the_teacher_which_stays(tmp_path: Path, loss: Any) -> None:
    optim = clip_params(loss=loss, negatives="local", epochs=4, lr=0.02, b=1.0)
    result = train(job_of(partial(taught, optim), optim, str(tmp_path)))
    first, last = (result.history[place]["metrics"] for place in (0, -1))
    assert last["val/loss"] < first["val/loss"]
    assert last["val/cosine"] > first["val/cosine"]
    assert result.best["metrics"]["val/loss"] == min(
        record["metrics"]["val/loss"] for record in result.history
    )
    method = taught(optim)
    result.load_best(method.module)
    assert method.module.state_dict().keys() == ToyTower(1).state_dict().keys()
    fresh = ToyTower(2)
    assert all(
        torch.equal(value, fresh.state_dict()[name]) for name, value in method.teacher.state_dict().items()
    )
    assert not method.teacher.training
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


def test_each_loss_is_the_one_that_is_named_and_negatives_may_stay_local() -> None:
    prepared = taught(clip_params()).prepare(batch_of(range(COUNT)))
    features, targets = ToyTower(1)(prepared["image"]), F.normalize(ToyTower(2)(prepared["image"]), dim=1)
    torch.testing.assert_close(prepared["target"], targets)
    cases = {
        "siglip": losses.siglip_loss(features, targets, 5.0, -3.0),
        "cosine": losses.cosine_embedding_loss(features, targets),
        "info_nce": losses.info_nce_loss(features, targets, 0.2),
    }
    for loss, wanted in cases.items():
        method = taught(
            clip_params(loss=loss, negatives="local", scale=5.0, pair_bias=-3.0, temperature_nce=0.2)
        )
        assert method.shared == ()
        torch.testing.assert_close(method.loss(method.module, prepared)["loss"], wanted)


def test_validation_is_over_images_and_its_loss_falls() -> None:
    method = taught(clip_params())
    known = directions(method)
    assert known["val/loss"] is False
    assert known["val/cosine"] is True
    metrics = method.metrics()
    halves = [batch_of(range(0, 10)), batch_of(range(10, COUNT))]
    with torch.no_grad():
        for half in halves:
            method.update(metrics, method.module, half)
        images = [add_inverse(half["image"]) for half in halves]
        both = [(ToyTower(1)(each), ToyTower(2)(each)) for each in images]
    found = metrics.compute()
    wanted = sum(len(one) * float(losses.siglip_loss(one, other, 10, -10)) for one, other in both) / COUNT
    assert float(found["loss"]) == pytest.approx(wanted, rel=1e-5)
    cosines = torch.cat([F.cosine_similarity(one, other) for one, other in both])
    assert float(found["cosine"]) == pytest.approx(float(cosines.mean()), rel=1e-5)


def tower_folder(folder: Path, vision: dict[str, Any], width: int = 16) -> models.ModelSpec:
    """Saves an image tower of open_clip in `folder` as a teacher; returns its spec."""
    options = {"embed_dim": width, "vision_cfg": vision}
    spec = models.ModelSpec(
        "open_clip:custom", (), vision["image_size"], "conventional", "embedding", options=options
    )
    torch.manual_seed(4)
    models.save(folder, models.assemble(spec), spec)
    return spec


@pytest.mark.parametrize("vision", [VIT, RN])
def test_a_tower_is_bcosified_from_the_teachers_weights(tmp_path: Path, vision: dict[str, Any]) -> None:
    optim = clip_params(
        b_mode="scheduled", b_start=1.0, b=2.0, b_epochs=2, bias="keep", position_embedding="keep"
    )
    original = tower_folder(tmp_path, vision)
    spec = dataclasses.replace(original, kind="bcos", design=optim.design())
    method = build_clip(spec, tmp_path, optim, seed=7)
    images = torch.rand(3, 3, original.image_size, original.image_size)
    with torch.no_grad():
        student, teacher = method.module.eval()(add_inverse(images)), method.teacher(add_inverse(images))
    assert (student - teacher).norm() < 1e-4 * teacher.norm()  # B is still 1
    method.set_progress(1.0)
    assert set(layer_b(method.module).values()) == {1.5}
    assert method.epoch_metrics()["b_mean"] == 1.5
    listed = [id(parameter) for group in method.parameter_groups(0.1) for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in method.module.parameters())


def test_a_teacher_of_another_width_is_refused(tmp_path: Path) -> None:
    optim = clip_params()
    original = tower_folder(tmp_path, VIT)
    other = dataclasses.replace(
        original, kind="bcos", options={**original.options, "embed_dim": 24}, design=optim.design()
    )
    with pytest.raises(ModelError, match=r"teacher: .*\(16,\).*\(24,\)"):
        build_clip(other, tmp_path, optim, seed=7)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"scale": math.nan}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"temperature_nce": -1.0}, "temperature_nce"),
        ({"loss": "info_nce"}, "negatives"),
        ({"mixup": 0.2}, "mixup"),
    ],
)
def test_params_that_cannot_be_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        clip_params(**values)


# Two towers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_two_towers_find_each_others_images_and_texts(tmp_path: Path, loss: Any) -> None:
    optim = captioned(loss=loss, epochs=6, validate_every=6)
    result = train(job_of(partial(pair, optim), optim, str(tmp_path)))
    metrics = result.history[-1]["metrics"]
    assert metrics["val/image_to_text_recall_at_1"] > 0.9
    assert metrics["val/text_to_image_recall_at_5"] > 0.9
    assert metrics["train/loss"] < result.history[0]["metrics"]["train/loss"]
    module = pair(optim).module
    result.load_best(module)
    ends = {"logit_scale"} | ({"logit_bias"} if loss == "siglip" else set())
    assert {name.partition(".")[0] for name in module.state_dict()} == {"image", "text"} | ends


def test_labels_teach_the_image_tower_beside_the_captions(tmp_path: Path) -> None:
    optim = captioned(label_weight=0.5, epochs=6, validate_every=6)
    result = train(job_of(partial(pair, optim), optim, str(tmp_path)))
    first, last = (result.history[epoch]["metrics"] for epoch in (0, -1))
    assert last["train/label"] < 0.5 * first["train/label"]
    assert last["train/loss"] == pytest.approx(last["train/pairs"] + 0.5 * last["train/label"], rel=1e-4)
    assert last["val/image_to_text_recall_at_1"] > 0.9


def test_several_labels_per_image_are_decisions_of_their_own() -> None:
    optim = captioned(label_weight=2.0)
    towers = pair(optim).module
    method = ImageTextTraining(towers, optim, "multilabel")
    several = torch.eye(CLASSES)[torch.arange(COUNT) % CLASSES]
    found = method.loss(towers, method.prepare({**batch_of(range(COUNT)), "labels": several}))
    logits = towers.classifier(towers.image(add_inverse(images_of())))
    assert found["label"] == F.binary_cross_entropy_with_logits(logits, several)
    assert found["loss"] == found["pairs"] + 2 * found["label"]


def test_labels_cannot_teach_a_locked_image_tower() -> None:
    with pytest.raises(ValidationError, match="label_weight: labels teach the image tower, which is locked"):
        captioned(label_weight=1.0, locked=True)


def test_a_locked_image_tower_stays_and_the_text_tower_comes_to_it(tmp_path: Path) -> None:
    optim = captioned(locked=True, epochs=6, validate_every=6)
    method: Method = pair(optim)
    method.module.train()
    assert not method.module.image.training
    assert method.module.text.training
    prepared = method.prepare(batch_of(range(COUNT)))
    assert prepared.keys() == {"features", "tokens"}
    assert not prepared["features"].requires_grad
    result = train(job_of(partial(pair, optim), optim, str(tmp_path)))
    result.load_last(method.module)
    fresh = pair(optim).module.state_dict()
    moved = {
        name.partition(".")[0]
        for name, value in method.module.state_dict().items()
        if not torch.equal(value, fresh[name])
    }
    assert moved == {"text", "logit_scale"}
    assert result.history[-1]["metrics"]["val/image_to_text_recall_at_5"] > 0.8


def test_the_scale_of_cosines_is_bounded() -> None:
    method = pair(captioned())
    with torch.no_grad():
        method.module.logit_scale.fill_(9.0)
    method.set_progress(0.5)
    assert method.epoch_metrics()["logit_scale"] == pytest.approx(100)


def test_an_image_without_a_caption_is_named() -> None:
    batch = batch_of(range(3))
    with pytest.raises(ModelError, match="image 1 has no caption"):
        pair(captioned()).prepare(batch | {"caption": ["0", " ", "2"]})
    del batch["caption"]
    with pytest.raises(ModelError, match="image 0 has no caption"):
        pair(captioned()).prepare(batch)


@pytest.mark.parametrize(
    ("batch_size", "workers", "on_error", "told"),
    [
        (12, 4, "raise", None),
        (13, 1, "skip", None),
        (13, 4, "raise", "batch_size: .* 4 workers: 12, not 13"),
        (12, (2, 5), "raise", "batch_size: .* 5 workers: 10, not 12"),
        (12, 4, "skip", "data.on_error"),
    ],
)
def test_shares_that_may_differ_are_refused_before_training(
    batch_size: int, workers: Any, on_error: Any, told: str | None
) -> None:
    training, data = TrainingParams(workers=workers), DataParams(image_size=SIDE, on_error=on_error)
    with nullcontext() if told is None else pytest.raises(ParamsError, match=told):
        check_equal_shares(batch_size, training, data)


@pytest.mark.parametrize("locked", [False, True])
def test_towers_of_open_clip_are_trained_and_saved(tmp_path: Path, locked: bool) -> None:
    spec = tower_folder(tmp_path / "image", VIT)
    options = {"embed_dim": 16, "text_cfg": TEXT}
    text = NetworkParams(name="open_clip:custom", options=options)
    model = ModelParams(
        name=spec.name, weights=str(tmp_path / "image" / "model.safetensors"), options=spec.options
    )
    optim = captioned(epochs=1, lr=0.001, locked=locked)
    build = partial(build_image_text, model, spec, text, optim, 0)
    original, _ = models.load(tmp_path / "image")
    method = build()
    images = torch.rand(COUNT, 3, 32, 32)
    tokens = method.towers.text.tokens(["a photo of a dog"] * COUNT)
    with torch.no_grad():
        assert torch.equal(method.towers.image.eval()(add_inverse(images)), original(add_inverse(images)))
    batch = {
        "key": ["k"] * COUNT,
        "image": images,
        "caption": [f"a photo of {row} dogs" for row in range(COUNT)],
    }
    job = dataclasses.replace(
        job_of(build, optim, str(tmp_path / "run")), batches=lambda *_, **__: [batch] * 2, spec=spec
    )
    result = train(dataclasses.replace(job, data=DataParams(image_size=32)))
    result.load_last(method.module)
    models.save(tmp_path / "pair", method.towers.image, spec)
    models.save_text_tower(tmp_path / "pair", method.towers.text)
    image, tower = models.load(tmp_path / "pair")[0], models.load_text_tower(tmp_path / "pair")
    with torch.no_grad():
        assert torch.equal(image(add_inverse(images)), original(add_inverse(images))) == locked
        assert torch.equal(tower(tokens), method.towers.text.eval()(tokens))


def test_towers_of_different_widths_are_refused(tmp_path: Path) -> None:
    spec = tower_folder(tmp_path, VIT)
    text = NetworkParams(name="open_clip:custom", options={"embed_dim": 24, "text_cfg": TEXT})
    with pytest.raises(ModelError, match=r"\(16,\), the text tower of \(24,\)"):
        build_image_text(ModelParams(name=spec.name, options=spec.options), spec, text, captioned(), 0)
