"""B-cosification in training: B's schedule and learning, decaying biases, mixup, checkpoints."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import models, params
from pipelines.bcos import BcosConv2d, BcosLinear, add_inverse, dynamic_weights, is_bias, layer_b
from pipelines.losses import uniform_off_label_bce
from pipelines.methods import Bcosification, Classification, Pretrain, build_bcosification
from pipelines.params import BcosificationParams, DataParams, TrainingParams
from pipelines.training import Job, checkpoints, train
from pipelines.training.optim import clip_gradients, optimiser
from tests.support.method_params import method_params

CLASSES, SIDE, COUNT = ("a", "b", "c"), 8, 24


def choices(**values: Any) -> BcosificationParams:
    return method_params(BcosificationParams, **{"epochs": 4, "clip": "agc", **values})


def spec_of(optim: BcosificationParams) -> models.ModelSpec:
    return models.ModelSpec("resnet8", CLASSES, SIDE, "bcos", options={"width": 4}, design=optim.design())


def method_of(optim: BcosificationParams, seed: int = 0) -> Bcosification:
    return build_bcosification(spec_of(optim), None, optim, seed)


def exponents(method: Bcosification) -> set[float]:
    return {round(value, 6) for value in layer_b(method.module).values()}


def random_batches(
    job: Job, split: str, *, epoch: int = 0, start_batch: int = 0, **_: Any
) -> list[dict[str, Any]]:
    """Returns batches of COUNT images, whose colour depends on their class."""
    labels = torch.arange(COUNT) % 3
    images = torch.rand(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(epoch))
    images[torch.arange(COUNT), labels] *= 0.3
    pieces = zip(images.split(8), labels.split(8), strict=True)
    return [{"key": ["k"] * 8, "image": image, "label": label} for image, label in pieces][start_batch:]


def job_of(directory: Path, optim: BcosificationParams, build: Any = None) -> Job:
    return Job(
        build=build or partial(method_of, optim),
        shards="",
        data=DataParams(image_size=SIDE),
        params=optim,
        training=TrainingParams(workers=0, checkpoint_every=2),
        seed=1,
        directory=str(directory),
        batches=random_batches,
    )


class Breaking(Bcosification):
    """Raises an error in its fifth step, which is the second of the second epoch."""

    steps = 0

    def prepare(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.steps += 1
        if self.steps == 5:
            raise ConnectionError
        return super().prepare(batch)


def breaking(optim: BcosificationParams) -> Breaking:
    method = method_of(optim)
    return Breaking(method.module, method.task, method.num_classes, optim)


# B ----------------------------------------------------------------------------------------------------------


def test_a_schedule_rises_in_equal_steps_reaches_b_and_stays_there() -> None:
    method = method_of(choices(b=2.5, b_mode="scheduled", b_start=1.5, b_epochs=2))
    assert exponents(method) == {1.5}
    for epochs, wanted in [(0, 1.5), (0.5, 1.75), (1, 2.0), (1.9, 2.45), (2, 2.5), (3.7, 2.5)]:
        method.set_progress(epochs)
        assert exponents(method) == {wanted}


def test_b_is_logged_each_epoch_by_layer_where_it_changes(tmp_path: Path) -> None:
    history = train(job_of(tmp_path / "run", choices(b_mode="scheduled", b_epochs=3))).history
    names = {f"train/b/{name}" for name in layer_b(method_of(choices()).module)}
    for record, wanted in zip(history, (4 / 3, 5 / 3, 2, 2), strict=True):
        assert names == {name for name in record["metrics"] if name.startswith("train/b/")}
        assert [record["metrics"][name] for name in [*names, "train/b_mean"]] == pytest.approx(
            [wanted] * (len(names) + 1)
        )
    fixed = method_of(choices(b=1.5)).epoch_metrics()
    assert fixed == {"b_mean": 1.5}


def test_a_learned_b_starts_where_it_is_told_moves_and_is_logged(tmp_path: Path) -> None:
    optim = choices(b_mode="learned", b_start=1.0)
    method = method_of(optim)
    assert exponents(method) == {1.0}
    assert set(method.epoch_metrics()) == {"b_mean"} | {f"b/{name}" for name in layer_b(method.module)}
    last = train(job_of(tmp_path / "run", optim)).history[-1]["metrics"]
    values = [value for name, value in last.items() if name.startswith("train/b/")]
    assert all(value >= 1 for value in values)
    assert max(values) > 1.01
    assert len(set(values)) > 1
    assert last["train/b_mean"] == pytest.approx(sum(values) / len(values))


def test_a_learned_b_that_would_fall_below_one_stays_there_and_can_leave_again() -> None:
    optim = choices(b_mode="learned", b_start=1.0)
    method = method_of(optim)
    layers = [module for module in method.module.modules() if isinstance(module, BcosConv2d | BcosLinear)]
    made = torch.optim.SGD([layer.b_offset for layer in layers], lr=0.5)
    for slope, wanted in ((1.0, 1.0), (1.0, 1.0), (-1.0, 1.5)):
        made.zero_grad()
        torch.stack([slope * layer.b for layer in layers]).sum().backward()
        made.step()
        method.set_progress(0.5)
        assert exponents(method) == {wanted}


def step_without_gradients(method: Bcosification, params: BcosificationParams) -> None:
    """Does one optimiser step, in which only weight decay changes the weights."""
    made = optimiser(method.parameter_groups(params.optim.weight_decay), params.optim)
    for parameter in method.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()


def state_of(method: Bcosification) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.module.named_parameters()}


@pytest.mark.parametrize("start", [1.0, 3.0])
def test_decay_pulls_a_learned_b_towards_two_and_nothing_else_does(start: float) -> None:
    learned = partial(choices, b_mode="learned", b_start=start, bias="keep", bias_decay=5.0)
    optim = learned(b_decay=10.0, weight_decay=0.0)
    method = method_of(optim)
    before = state_of(method)
    step_without_gradients(method, optim)
    assert exponents(method) == {round(2 + (start - 2) * (1 - 0.01 * 10), 6)}
    changed = {
        name.rpartition(".")[2]
        for name, value in state_of(method).items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"b_offset"}
    unpulled = learned(b_decay=0.0, weight_decay=0.5)
    other = method_of(unpulled)
    step_without_gradients(other, unpulled)
    assert exponents(other) == {start}


def test_adaptive_clipping_leaves_a_learned_b_alone() -> None:
    # The offset B - 2 is 0, so a bound relative to its size would clip its gradient to almost nothing.
    method = method_of(choices(b_mode="learned", b_start=2.0))
    for parameter in method.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip_gradients(method.module.parameters(), choices().optim)
    for name, parameter in method.module.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter)) == name.endswith("b_offset")


# Biases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "shrinks"), [("decay", True), ("keep", False)])
def test_biases_alone_decay_the_norms_too_where_they_shall(bias: Any, shrinks: bool) -> None:
    optim = choices(bias=bias, bias_decay=20.0, weight_decay=0.0)
    method = method_of(optim)
    biases = {
        name: parameter for name, parameter in method.module.named_parameters() if name.endswith("bias")
    }
    assert any("bn1" in name for name in biases)
    with torch.no_grad():
        for parameter in biases.values():
            parameter.fill_(0.5)
    assert method.epoch_metrics()["bias_abs_mean"] == pytest.approx(0.5)
    before = state_of(method)
    step_without_gradients(method, optim)
    assert method.epoch_metrics()["bias_abs_mean"] == pytest.approx(0.5 * (1 - 0.01 * 20) if shrinks else 0.5)
    assert all(
        torch.equal(value, before[name]) for name, value in state_of(method).items() if name not in biases
    )


def test_without_biases_none_are_logged() -> None:
    assert "bias_abs_mean" not in method_of(choices(bias="remove")).epoch_metrics()


def test_every_parameter_is_in_one_group_and_weight_decay_is_that_of_weights() -> None:
    optim = choices(b_mode="learned", bias="decay", bias_decay=0.2, b_decay=0.3)
    method = method_of(optim)
    groups = method.parameter_groups(0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in method.module.parameters())
    assert {group["weight_decay"]: {parameter.ndim for parameter in group["params"]} for group in groups} == {
        0.1: {2, 4},
        0.0: {1},
        0.2: {1},
        0.3: {0},
    }


# Resuming, and what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"b_mode": "scheduled", "b_epochs": 3},
        {"b_mode": "learned", "b_decay": 1.0, "bias": "decay", "bias_decay": 1.0},
        {"mixup": 0.2},
    ],
)
def test_resumed_in_mid_epoch_is_as_never_stopped(tmp_path: Path, values: dict[str, Any]) -> None:
    optim = choices(**values)
    whole = train(job_of(tmp_path / "whole", optim))
    with pytest.raises(ConnectionError):
        train(job_of(tmp_path / "run", optim, partial(breaking, optim)))
    resumed = train(job_of(tmp_path / "run", optim))
    first, second = (checkpoints.load(result.directory, 12)["model"] for result in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rate = "train/images_per_second"
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert {**one["metrics"], rate: 0} == {**other["metrics"], rate: 0}


@pytest.mark.parametrize("mode", ["scheduled", "learned"])
def test_the_best_model_is_saved_with_the_b_that_it_was_validated_with(tmp_path: Path, mode: Any) -> None:
    optim = choices(b_mode=mode, b_epochs=4, b=2.0)
    result = train(job_of(tmp_path / "run", optim))
    assert result.best["epoch"] == 4 or mode == "learned"
    module = method_of(optim, seed=5).module
    result.load_best(module)
    models.save(tmp_path / "model", module, spec_of(optim))
    loaded, spec = models.load(tmp_path / "model")
    fixed = {"b": 2.0, "b_mode": "fixed"} if mode == "scheduled" else {}  # a schedule ends with training
    assert spec == dataclasses.replace(spec_of(optim), design={**module.design, **fixed})
    logged = {name: value for name, value in result.best["metrics"].items() if name.startswith("train/b/")}
    assert {f"train/b/{name}": value for name, value in layer_b(loaded).items()} == logged
    images = add_inverse(torch.rand(4, 3, SIDE, SIDE))
    exact = {"rtol": 0, "atol": 0} if mode == "learned" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loaded(images), module.eval()(images), **exact)


def test_no_epoch_before_the_end_of_the_schedule_is_the_best(tmp_path: Path) -> None:
    optim = choices(b_mode="scheduled", b_epochs=3, select="train/loss", patience=None)
    history = train(job_of(tmp_path / "run", optim)).history
    for record in history:  # as a loss, B is lowest at the start of its schedule
        record["metrics"]["loss of b"] = record["metrics"]["train/b_mean"]
    from pipelines.training import best_record

    by_loss = optim.model_copy(update={"select": "loss of b"})
    assert best_record(history, by_loss.model_copy(update={"b_epochs": 1}))["epoch"] == 1
    assert best_record(history, by_loss)["epoch"] == 3
    assert best_record(history[:2], by_loss)["epoch"] == 1


# Mixup ------------------------------------------------------------------------------------------------------


def test_mixup_mixes_images_and_targets_by_one_share_from_torchs_generator() -> None:
    method = Classification(nn.Identity(), "multiclass", 3, mixup=0.4)
    images, labels = torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(4)
    first = method.prepare({"image": images.clone(), "label": labels})
    torch.manual_seed(4)
    again = method.prepare({"image": images.clone(), "label": labels})
    assert all(torch.equal(first[name], again[name]) for name in first)
    share = float(first["target"][0, 0])
    assert 0 < share < 1
    wanted = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels, 3).roll(1, 0)
    assert torch.allclose(first["target"], wanted)
    mixed = share * images + (1 - share) * images.roll(1, 0)
    assert torch.allclose(first["image"], torch.cat([mixed, 1 - mixed], 1))
    other = method.prepare({"image": images, "label": labels})
    assert not torch.equal(first["target"], other["target"])


def test_without_mixup_a_batch_is_as_it_was() -> None:
    images, labels = torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    state = torch.get_rng_state()
    made = Classification(nn.Identity(), "multiclass", 3).prepare({"image": images, "label": labels})
    assert torch.equal(made["target"], labels)
    assert torch.equal(made["image"], add_inverse(images))
    assert torch.equal(state, torch.get_rng_state())


def test_mixed_targets_are_clamped_from_below_by_one_over_k_and_kept_above() -> None:
    logits = torch.randn(2, 4)
    targets = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.4, 0.6, 0.0]])
    wanted = torch.tensor([[0.9, 0.25, 0.25, 0.25], [0.25, 0.4, 0.6, 0.25]])
    assert torch.allclose(
        uniform_off_label_bce(logits, targets), F.binary_cross_entropy_with_logits(logits, wanted)
    )


def test_the_conventional_loss_of_mixed_targets_is_the_mean_of_the_two_losses() -> None:
    method = Pretrain(nn.Identity(), "multiclass", 3, mixup=0.4)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    mixed = 0.7 * F.one_hot(labels, 3) + 0.3 * F.one_hot(labels, 3).roll(1, 0)
    found = method.loss(method.module, {"image": logits, "target": mixed})["loss"]
    assert torch.allclose(
        found, 0.7 * F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(logits, labels.roll(1))
    )


def test_several_labels_are_mixed_too_and_each_class_has_its_own_loss() -> None:
    method = Pretrain(nn.Identity(), "multilabel", 3, mixup=0.4)
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    made = method.prepare({"image": torch.rand(2, 3, 2, 2), "labels": labels})
    share = float(made["target"][0, 0])
    assert torch.allclose(made["target"], share * labels + (1 - share) * labels.roll(1, 0))
    logits = torch.randn(2, 3)
    wanted = F.binary_cross_entropy_with_logits(logits, made["target"])
    assert torch.equal(method.loss(method.module, {**made, "image": logits})["loss"], wanted)


# Biases that fade -----------------------------------------------------------------------------------------


def test_fading_biases_shrink_by_equal_steps_and_stay_gone_whatever_the_optimiser_does() -> None:
    method = method_of(choices(bias="fade", bias_epochs=2))
    biases = [parameter for name, parameter in method.module.named_parameters() if is_bias(name)]
    with torch.no_grad():
        for bias in biases:
            bias.fill_(0.8)
    for epochs, wanted in [(0, 0.8), (0.5, 0.6), (0.5, 0.6), (1.5, 0.2), (2, 0.0)]:
        method.set_progress(epochs)
        for bias in biases:
            torch.testing.assert_close(bias, torch.full_like(bias, wanted))
    with torch.no_grad():
        for bias in biases:
            bias.add_(0.3)
    method.set_progress(2.5)
    assert method.epoch_metrics()["bias_abs_mean"] == 0


def test_once_biases_have_faded_contributions_sum_to_the_logit(tmp_path: Path) -> None:
    optim = choices(bias="fade", bias_epochs=1, select="train/loss", patience=None)
    assert optim.settled == 1
    method = method_of(optim)
    train(job_of(tmp_path / "run", optim))
    state = checkpoints.load(str(tmp_path / "run"), checkpoints.newest(str(tmp_path / "run"))["step"])[
        "model"
    ]
    method.module.load_state_dict(state)
    network = method.module.eval()
    images = add_inverse(torch.rand(2, 3, SIDE, SIDE))
    logits, weights = dynamic_weights(network, images, torch.tensor([0, 1]))
    mean = network.mean[:, None, None]
    told = (weights * (images - mean)).sum((1, 2, 3)) + network.logit_bias
    torch.testing.assert_close(told, logits.gather(1, torch.tensor([[0], [1]]))[:, 0], rtol=1e-4, atol=1e-4)


def test_a_fade_goes_on_from_a_checkpoint_as_if_it_had_never_stopped() -> None:
    whole, stopped = (method_of(choices(bias="fade", bias_epochs=2)) for _ in range(2))
    stopped.module.load_state_dict(whole.module.state_dict())
    for epochs in (0.0, 0.5, 1.0, 1.5):
        whole.set_progress(epochs)
    for epochs in (0.0, 0.5):
        stopped.set_progress(epochs)
    resumed = method_of(choices(bias="fade", bias_epochs=2))
    resumed.module.load_state_dict(stopped.module.state_dict())
    for epochs in (1.0, 1.5):
        resumed.set_progress(epochs)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"b_mode": "scheduled", "b_epochs": 9},
            r"pretrained: b_epochs: a schedule over 9 epochs does not reach b in 5 epochs$",
        ),
        (
            {"bias": "fade", "bias_epochs": 9},
            r"pretrained: bias_epochs: biases that fade over 9 epochs are not gone after 5$",
        ),
        (
            {"b_mode": "learned", "b": 1.5},
            r"pretrained: b: a learned B is pulled towards 2, not 1.5; [^\n]*$",
        ),
        (
            {"bias": "decay", "bias_decay": 0},
            r"pretrained: bias_decay: biases that decay need a decay above 0; [^\n]*$",
        ),
        ({"max_out": 2}, r"bcosify: pretrained.max_out: 2 units are all drawn at random[^\n]*$"),
        ({"b_start": 0.5}, r"pretrained.b_start: .*greater than or equal to 1"),
    ],
)
def test_choices_that_do_not_go_together_are_one_line(values: dict[str, Any], told: str) -> None:
    content = params.load().model_dump(mode="json")
    content["bcosify"]["pretrained"] |= values
    with pytest.raises(params.ParamsError, match=told):
        params.validate(content, "params.yaml")
