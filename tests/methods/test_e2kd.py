"""e²KD: the loss, its gradient, passes of the teacher, and pairs that do not fit."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines import models
from pipelines.attribution import attribute, last_features
from pipelines.bcos import add_inverse, dynamic_weights
from pipelines.methods import E2KD, build_e2kd, check_pair
from pipelines.models import ModelError, ModelSpec
from pipelines.params import DataParams, DistillationParams, StudentParams, TrainingParams
from pipelines.training import Job, TrainingError, checkpoints, train
from pipelines.training.job import directions
from pipelines.training.objective import build_objective
from tests.support.method_params import method_params

CLASSES, SIDE = ("a", "b", "c"), 8
EAGER = TrainingParams(workers=0)


def settings(**values: Any) -> DistillationParams:
    return method_params(DistillationParams, **{"epochs": 2, "explanation_weight": 2.0, **values})


def spec_of(kind: Any, name: str = "resnet8", **more: Any) -> ModelSpec:
    options = {"width": 4} if name == "resnet8" else {"img_size": SIDE, "patch_size": 4, "depth": 1}
    return ModelSpec(name, CLASSES, SIDE, kind, options=options, **more)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    for seed, kind in enumerate(("bcos", "conventional")):
        torch.manual_seed(seed)
        spec = spec_of(kind)
        model = models.assemble(spec).train()
        model(images(32))  # sets the running statistics of the norms
        models.save(folder / kind, model, spec)
    return {kind: folder / kind for kind in ("bcos", "conventional")}


def images(count: int, seed: int = 0) -> Tensor:
    return add_inverse(torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)))


def batch_of(count: int = 6, seed: int = 0, step: int = 0) -> dict[str, Any]:
    return {
        "key": ["k"] * count,
        "image": images(count, seed)[:, :3],
        "label": torch.arange(count) % 3,
        "step": step,
    }


def method_of(
    teacher: Path, kind: str = "bcos", teacher_kind: str = "bcos", name: str = "resnet8", **values: Any
) -> E2KD:
    spec = spec_of(kind, name)
    student = StudentParams(name=name, options=spec.options, kind=kind)  # type: ignore[arg-type]
    return build_e2kd(student, spec, teacher, settings(**values), 3)


def gradients(method: E2KD, loss: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, list(method.module.parameters()), allow_unused=True, materialize_grads=True)
    )


# The loss ---------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers(teachers: dict[str, Path]) -> None:
    method = method_of(teachers["bcos"], temperature=3.0, explanation_weight=2.0, label_weight=0.5)
    other, batch = copy.deepcopy(method.module), batch_of()
    method.module.train()
    found = method.loss(method.module, method.prepare(batch))
    x, teacher = images(6), method.teacher
    t = teacher(x)
    s, of_student = dynamic_weights(other.train(), x, t.argmax(1))
    _, of_teacher = dynamic_weights(teacher, x, t.argmax(1))
    p = (t / 3).softmax(1)
    kl = 9 * (p * (p.log() - (s / 3).log_softmax(1))).sum(1).mean()
    cosines = (of_student * of_teacher).sum((1, 2, 3)) / (
        of_student.flatten(1).norm(dim=1) * of_teacher.flatten(1).norm(dim=1)
    )
    targets = F.one_hot(batch["label"], 3).float().clamp_min(1 / 3)
    bce = F.binary_cross_entropy_with_logits(s, targets)
    torch.testing.assert_close(found["distillation"], kl)
    torch.testing.assert_close(found["explanation"], (1 - cosines).mean())
    torch.testing.assert_close(found["label"], bce)
    torch.testing.assert_close(found["loss"], kl + 2 * (1 - cosines).mean() + 0.5 * bce)


@pytest.mark.parametrize("kind", ["bcos", "conventional"])
def test_without_explanations_it_is_plain_distillation_and_the_labels_are_not_looked_at(
    teachers: dict[str, Path], kind: str
) -> None:
    method = method_of(teachers[kind], kind, explanation_weight=0.0, temperature=2.0)
    batch = batch_of()
    del batch["label"]  # unlabelled images
    prepared = method.prepare(batch)
    assert set(prepared) == {"image", "teacher_logits"}
    found = method.loss(method.module, prepared)
    t, s = method.teacher(images(6)) / 2, method.module(images(6)) / 2
    wanted = 4 * F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    torch.testing.assert_close(found["loss"], wanted)
    assert set(found) == {"loss", "distillation"}


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_unlabelled_images_can_be_mixed(teachers: dict[str, Path], task: str) -> None:
    spec, options = spec_of("bcos"), settings(mixup=0.2)
    student = StudentParams(name="resnet8", options=spec.options)
    method = build_e2kd(student, spec, teachers["bcos"], options, 3, labelled=False)
    method.task = task
    batch = batch_of()
    del batch["label"]
    prepared = method.prepare(batch)
    assert bool((prepared["image"] != images(6)).any())
    assert torch.isfinite(method.loss(method.module, prepared)["loss"])


def test_a_pair_that_is_not_bcos_is_compared_by_gradcam(teachers: dict[str, Path]) -> None:
    for teacher in ("conventional", "bcos"):
        method = method_of(teachers[teacher], "conventional")
        prepared = method.prepare(batch_of())
        targets = method.teacher(images(6)).argmax(1)
        other = copy.deepcopy(method.module)
        wanted = [
            attribute(model, images(6), targets, method="gradcam", layer=last_features(model, images(1)))
            for model in (method.teacher, other)
        ]
        torch.testing.assert_close(prepared["teacher_maps"], wanted[0])
        found = method.loss(method.module, prepared)["explanation"]
        torch.testing.assert_close(
            found, (1 - F.cosine_similarity(wanted[1].flatten(1), wanted[0].flatten(1))).mean()
        )


def test_several_labels_are_distilled_class_by_class(teachers: dict[str, Path], tmp_path: Path) -> None:
    model, spec = models.load(teachers["bcos"])
    several = ModelSpec(**{**spec.__dict__, "task": "multilabel"})
    models.save(tmp_path / "teacher", model, several)
    student = StudentParams(name="resnet8", options=spec.options)
    method = build_e2kd(
        student, several, tmp_path / "teacher", settings(explanation_weight=0.0, temperature=2.0), 3
    )
    found = method.loss(method.module, method.prepare(batch_of()))["loss"]
    t, s = method.teacher(images(6)) / 2, method.module(images(6)) / 2
    p, q = t.sigmoid(), s.sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found, 4 * kl.sum(1).mean())


# Gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bcos", "resnet8"), ("conventional", "resnet8"), ("bcos", "timm:vit_tiny_patch16_224")],
)
def test_the_gradient_is_that_of_finite_differences(teachers: dict[str, Path], kind: str, name: str) -> None:
    method = method_of(teachers[kind], kind, name=name, label_weight=0.3, temperature=2.0)
    for module in (method.module, method.teacher):
        module.double()
    batch = batch_of(4)
    batch["image"] = batch["image"].double()
    prepared = method.prepare(batch)
    assert {value.dtype for key, value in prepared.items() if key != "target"} == {torch.float64}
    method.module.train()
    parameters = list(method.module.parameters())
    found = gradients(method, method.loss(method.module, prepared)["loss"])
    torch.manual_seed(0)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    expected = sum(float((gradient * way).sum()) for gradient, way in zip(found, directions, strict=True))
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, way in zip(parameters, directions, strict=True):
                parameter.add_(way, alpha=sign * step)
        values.append(float(method.loss(method.module, prepared)["loss"].detach()))
        with torch.no_grad():
            for parameter, way in zip(parameters, directions, strict=True):
                parameter.sub_(way, alpha=sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(expected) > 1e-3


def test_the_explanation_comes_from_the_pass_that_gives_the_logits(teachers: dict[str, Path]) -> None:
    for kind in ("bcos", "conventional"):
        method, passes = method_of(teachers[kind], kind), []
        prepared = method.prepare(batch_of())
        method.module.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        method.loss(method.module, prepared)
        assert len(passes) == 1


# The teacher ------------------------------------------------------------------------------------------------


def class_batches(
    job: Job, split: str, *, epoch: int = 0, start_batch: int = 0, **_: Any
) -> list[dict[str, Any]]:
    made = [
        {key: value for key, value in batch_of(8, epoch * 10 + part).items() if key != "step"}
        for part in range(3)
    ]
    return made[start_batch:]


def job_of(directory: Path, build: Any, optim: DistillationParams, **training: Any) -> Job:
    return Job(
        build=build,
        shards="",
        data=DataParams(image_size=SIDE),
        params=optim,
        training=TrainingParams(**{"workers": 0, "checkpoint_every": 2, **training}),
        seed=1,
        directory=str(directory),
        batches=class_batches,
    )


@pytest.mark.parametrize("kind", ["bcos", "conventional"])
def test_training_leaves_the_teacher_bit_for_bit_as_it_was_and_out_of_the_checkpoint(
    teachers: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    kept: list[E2KD] = []

    def build() -> E2KD:
        kept.append(method_of(teachers[kind], kind, label_weight=0.1))
        return kept[-1]

    result = train(job_of(tmp_path / "run", build, settings(label_weight=0.1)))
    before = models.load(teachers[kind])[0].state_dict()
    after = kept[0].teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not kept[0].teacher.training
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in kept[0].teacher.parameters()
    )
    state = checkpoints.load(result.directory, 6)["model"]
    assert state.keys() == kept[0].module.state_dict().keys()
    last = result.history[-1]["metrics"]
    assert {"train/distillation", "train/explanation", "train/label", "val/agreement", "val/accuracy"} <= set(
        last
    )


def test_what_the_teacher_gives_has_no_graph(teachers: dict[str, Path]) -> None:
    prepared = method_of(teachers["bcos"]).prepare(batch_of())
    assert prepared["teacher_maps"].shape == (6, 6, SIDE, SIDE)
    assert not any(value.requires_grad for value in prepared.values())


def test_agreement_is_measured_over_the_whole_split(teachers: dict[str, Path]) -> None:
    method = method_of(teachers["bcos"])
    method.module.eval()
    metrics = method.metrics()
    for seed in range(3):
        method.update(metrics, method.module, batch_of(5 + seed, seed))
    x = torch.cat([images(5 + seed, seed) for seed in range(3)])
    equal = method.module(x).argmax(1) == method.teacher(x).argmax(1)
    assert metrics.compute()["agreement"].item() == pytest.approx(equal.float().mean().item())


# When explanations are matched ------------------------------------------------------------------------------


def test_explanations_are_matched_on_every_so_many_th_step(teachers: dict[str, Path]) -> None:
    method = method_of(teachers["bcos"], explain_every=3)
    matched = ["teacher_maps" in method.prepare(batch_of(step=step)) for step in range(7)]
    assert matched == [True, False, False, True, False, False, True]


class Breaking(E2KD):
    """Raises an error in its fifth step, which is the second of the second epoch."""

    steps = 0

    def prepare(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.steps += 1
        if self.steps == 5:
            raise ConnectionError
        return super().prepare(batch)


def breaking(teacher: Path, **values: Any) -> E2KD:
    method = method_of(teacher, **values)
    method.__class__ = Breaking
    return method


def test_resumed_in_mid_epoch_explains_the_same_steps(teachers: dict[str, Path], tmp_path: Path) -> None:
    values = {"explain_every": 3, "mixup": 0.2}
    build = partial(method_of, teachers["bcos"], **values)
    whole = train(job_of(tmp_path / "whole", build, settings(**values)))
    with pytest.raises(ConnectionError):
        train(job_of(tmp_path / "run", partial(breaking, teachers["bcos"], **values), settings(**values)))
    resumed = train(job_of(tmp_path / "run", build, settings(**values)))
    first, second = (checkpoints.load(result.directory, 6)["model"] for result in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert one["metrics"]["train/explanation"] == other["metrics"]["train/explanation"]


# Compiled, in parts, in half precision ----------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["bcos", "conventional"])
def test_compiled_it_has_the_eager_gradient(teachers: dict[str, Path], kind: str) -> None:
    torch.compiler.reset()
    eager, compiled = (method_of(teachers[kind], kind, label_weight=0.2) for _ in range(2))
    objectives = [build_objective(eager, EAGER).train(), build_objective(compiled, EAGER).train()]
    objectives[1].compile(backend="aot_eager", dynamic=False, fullgraph=kind == "bcos")
    compiled.teacher.compile(backend="aot_eager", dynamic=False)
    losses, found = [], []
    for method, objective in zip((eager, compiled), objectives, strict=True):
        losses.append(objective(method.prepare(batch_of())))
        found.append(gradients(method, losses[-1]["loss"]))
    torch.compiler.reset()
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
    # Running statistics have moved once.
    for one, other in zip(eager.module.buffers(), compiled.module.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_in_parts_in_half_precision_and_channels_last_learns(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    optim = settings(epochs=12, lr=0.02)
    build = partial(method_of, teachers["bcos"], epochs=12, lr=0.02)
    history = train(
        job_of(tmp_path / "run", build, optim, precision="bfloat16", accumulate=2, channels_last=True)
    ).history
    assert history[-1]["metrics"]["train/explanation"] < history[0]["metrics"]["train/explanation"] - 0.05


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_teacher_takes_no_more_images_at_once_than_the_student(
    teachers: dict[str, Path], weight: float
) -> None:
    method = method_of(teachers["bcos"], explanation_weight=weight)
    taken: list[int] = []
    method.teacher.register_forward_pre_hook(lambda module, args: taken.append(len(args[0])))
    whole = method.prepare(batch_of())
    parted = method.prepare({**batch_of(), "parts": 3})
    count = len(whole["image"])
    assert taken[0] == count
    assert max(taken[1:]) == -(-count // 3)
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value)


# What fits together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "explained", "told"),
    [
        (
            spec_of("conventional"),
            True,
            r"a conventional teacher has no dynamic weights .* GradCAM.*explanation_weight: 0",
        ),
        (
            ModelSpec("resnet8", ("a", "b", "d"), SIDE, "bcos"),
            False,
            r"knows 3 classes \(a, b, d\); the data has 3 .*\(a, b, c\)",
        ),
        (
            ModelSpec("resnet8", CLASSES, 16, "bcos"),
            True,
            "trained at 16 px; image_size must be the same, not 8",
        ),
        (spec_of("bcos", task="multilabel"), True, "task multilabel; the data has the task multiclass"),
    ],
)
def test_a_pair_that_does_not_fit_is_one_line(teacher: ModelSpec, explained: bool, told: str) -> None:
    with pytest.raises(ModelError, match=rf"^teacher: [^\n]*{told}[^\n]*$"):
        check_pair(spec_of("bcos"), teacher, explained)


def test_any_other_pair_fits() -> None:
    check_pair(spec_of("bcos"), spec_of("conventional"), explained=False)
    check_pair(spec_of("conventional"), spec_of("conventional"), explained=True)
    check_pair(spec_of("conventional"), spec_of("bcos"), explained=True)


@pytest.mark.parametrize("values", [{}, {"explanation_weight": 0.0}, {"label_weight": 0.5}])
def test_an_epoch_can_be_selected_by_each_loss_that_there_is(
    teachers: dict[str, Path], values: dict[str, float]
) -> None:
    method = method_of(teachers["bcos"], **values)
    losses = method.loss(method.module, method.prepare(batch_of()))
    assert {f"train/{name}": False for name in losses} == {
        k: v for k, v in directions(method).items() if k.startswith("train/")
    }


def test_the_epoch_with_the_least_distillation_loss_is_the_best(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    build = partial(method_of, teachers["bcos"])
    result = train(job_of(tmp_path / "run", build, settings(select="train/distillation", epochs=3)))
    found = [row["metrics"]["train/distillation"] for row in result.history]
    assert result.best["metrics"]["train/distillation"] == min(found) < max(found)
    with pytest.raises(
        TrainingError, match=r"^select: no metric 'train/localisation'; there are .*train/distillation"
    ):
        train(job_of(tmp_path / "other", build, settings(select="train/localisation")))


def test_a_metric_to_select_by_that_unlabelled_data_does_not_have_is_refused(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    spec = spec_of("bcos")
    student = StudentParams(name="resnet8", options=spec.options)
    build = partial(build_e2kd, student, spec, teachers["bcos"], settings(), 3, labelled=False)
    assert set(build().metrics()) == {"agreement"}
    with pytest.raises(TrainingError, match=r"no metric 'val/accuracy'; there are val/agreement"):
        train(job_of(tmp_path / "run", build, settings()))
