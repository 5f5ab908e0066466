"""Checks before a launch, errors that no restart follows, and the start of Ray."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import UserError
from pipelines.methods import build_pretrain
from pipelines.models import ModelError, ModelSpec
from pipelines.params import DataParams, ModelParams, PretrainParams, TrainingParams
from pipelines.storage import files
from pipelines.training import Context, TrainingError, loop, train
from pipelines.training.launch import _failure_policy, _ray_folder, check, is_final
from tests.support.method_params import method_params
from tests.support.toy import toy_job

LAUNCH = import_module("pipelines.training.launch")  # `pipelines.training.launch` is the function
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # name, options, a size that the model refuses
    "timm's ViT": ("timm:vit_tiny_patch16_224", {"depth": 1}, 32),
    "timm's ViT, of another size": ("timm:vit_tiny_patch16_224", {"depth": 1, "img_size": 64}, 224),
    "a network that pools more than there is": ("torchvision:squeezenet1_1", {}, 8),
}
SAYS = {
    "timm's ViT": "takes images of 224, data.image_size is 32",
    "timm's ViT, of another size": "takes images of 64, data.image_size is 224",
    "a network that pools more than there is": r"takes no images of 8 \(data.image_size\): Given input size",
}


def model_job(directory: Path, kind: str, size: int | None = None, **params: Any) -> Any:
    """Returns a job that trains one of MODELS conventionally."""
    name, options, wrong = MODELS[kind]
    size = size or wrong
    spec = ModelSpec(name, tuple("abc"), size, "conventional", options=options)
    build = partial(
        build_pretrain,
        ModelParams(name=name, options=options),
        spec,
        method_params(PretrainParams),
        0,
    )
    return replace(toy_job(directory, build, **params), spec=spec, data=DataParams(image_size=size))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", list(MODELS))
def test_images_that_a_network_does_not_take_are_told_before_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int
) -> None:
    if workers:
        monkeypatch.setattr(LAUNCH, "launch", lambda *args, **options: pytest.fail("launched"))
    with pytest.raises(ModelError, match=rf"^model {MODELS[kind][0]} {SAYS[kind]}[^\n]*$"):
        train(model_job(tmp_path / "run", kind, workers=workers))


def test_images_that_it_takes_pass(tmp_path: Path) -> None:
    check(model_job(tmp_path / "run", "timm's ViT, of another size", 64, workers=3))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"workers": 9}, r"^batch_size 8 \(over all workers\) is less"),
        ({"select": "val/f1"}, r"^select: no metric 'val/f1'; there are val/accuracy"),
    ],
)
def test_params_that_do_not_fit_are_told_before_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(LAUNCH, "launch", lambda *args, **options: pytest.fail("launched"))
    with pytest.raises(UserError, match=says):
        train(toy_job(tmp_path / "run", **{"workers": 2, **changes}))


@pytest.mark.parametrize(
    "error",
    [
        *(
            AssertionError("Input height (32) doesn't match model (224)."),
            ZeroDivisionError(),
            NotImplementedError("no kernel"),
        ),
        *(ValueError("x"), TrainingError("x"), KeyError("x")),
    ],
)
def test_errors_of_what_is_computed_are_final(error: Exception) -> None:
    assert is_final(error)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: torch.zeros(2, 3) @ torch.zeros(4, 5),
        lambda: torch.zeros(3) + torch.zeros(4),
        lambda: torch.conv2d(torch.zeros(1, 6, 4, 4), torch.zeros(8, 3, 3, 3)),
        lambda: torch.zeros(5).view(2, 3),
        lambda: torch.cat([torch.zeros(1, 2), torch.zeros(1, 3)]),
        lambda: torch.nn.Linear(2, 2).load_state_dict(torch.nn.Linear(3, 2).state_dict()),
        lambda: torch.nn.functional.linear(torch.zeros(1, 2), torch.zeros(2, 2, dtype=torch.float64)),
    ],
)
def test_tensors_that_do_not_fit_together_are_final(compute: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        compute()
    assert is_final(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        *(
            ConnectionError("reset"),
            OSError(5, "Input/output error"),
            torch.OutOfMemoryError("CUDA out of memory"),
        ),
        RuntimeError(
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:51234"
        ),
        RuntimeError(
            "[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 20 vs 4, sizes"
        ),
        torch.distributed.DistBackendError("NCCL error, sizes of buffers"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    ],
)
def test_errors_that_another_try_may_be_spared_are_not(error: Exception) -> None:
    assert not is_final(error)


# Failures between checkpoints -------------------------------------------------------------------------------


@pytest.mark.ray
def test_failures_are_counted_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    from ray import cloudpickle
    from ray.train import FailureConfig
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.exceptions import WorkerGroupError

    policy = cloudpickle.loads(
        cloudpickle.dumps(_failure_policy(FailureConfig(max_failures=2), str(tmp_path)))
    )
    error, again = WorkerGroupError("lost", {0: OSError("lost")}), FailureDecision.RETRY
    for step in range(1, 6):  # any number of times
        assert [policy.make_decision(error) for _ in range(2)] == [again, again]
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step}/state.pt").touch()  # incomplete without complete.json
        files.write_json(tmp_path / f"checkpoints/step-{step}/complete.json", {})
    assert [policy.make_decision(error) for _ in range(2)] == [again, again]
    (tmp_path / "checkpoints/step-9").mkdir()
    assert policy.make_decision(error) == FailureDecision.RAISE


# Ray on this machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("length", [10, 43, 44, 300])
def test_ray_has_a_short_folder_if_its_own_would_be_too_long(
    monkeypatch: pytest.MonkeyPatch, variable: str, length: int
) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/" + "x" * (length - 5))  # Ray appends "/ray"
    with _ray_folder() as folder:
        assert (folder is None) == (length <= 43)
        if folder is not None:
            assert Path(folder).is_dir()
            assert len(folder) <= 43
    assert folder is None or not Path(folder).exists()


def test_no_short_folder_for_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "x" * 90)
    monkeypatch.setattr(LAUNCH, "short_folder", lambda: None)
    with (
        pytest.raises(
            TrainingError,
            match=r"^TMPDIR is too long for Ray's sockets: RAY_TMPDIR .* at most 39 characters$",
        ),
        _ray_folder(),
    ):
        pass


def test_without_a_named_folder_ray_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with _ray_folder() as folder:
        assert folder is None


@pytest.mark.parametrize(
    ("cpus", "processes", "expected"), [(1, 0, 1), (1, 3, 4), (6, 3, 6), (0.5, 0, 0.5), (0.5, 2, 3)]
)
def test_a_workers_cpus_count_its_loaders_processes(cpus: float, processes: int, expected: float) -> None:
    assert TrainingParams(cpus_per_worker=cpus).with_loader(processes).cpus_per_worker == expected


# Another number of workers ----------------------------------------------------------------------------------


def test_after_a_change_of_workers_each_step_has_random_numbers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = toy_job(tmp_path / "run", epochs=1)
    run = loop.set_up(Context(), job)
    state = {"model": run.method.module.state_dict(), "optimiser": run.optimiser.state_dict()}
    two = [{"rng": None, "tally": loop.Tally().state()}] * 2
    monkeypatch.setattr(
        "pipelines.training.loop.checkpoints.load", lambda directory, step: {**state, "ranks": two}
    )

    def drawn_at(step: int) -> list[float]:
        loop.resume(run, {"step": step, "epoch": 0, "batches": step % 6, "history": []})
        return torch.rand(4).tolist()

    fresh = loop.set_up(Context(), job) and torch.rand(4).tolist()
    assert drawn_at(2) == drawn_at(2)
    assert len({tuple(values) for values in (fresh, drawn_at(2), drawn_at(3), drawn_at(8))}) == 4
