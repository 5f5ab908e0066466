"""Weights files as training scripts write them: read by content, without running code."""

import argparse
import collections
import datetime
import gzip
import json
import os
import pathlib
import shutil
import sys
import types
import zipfile
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pipelines.models import WeightsError, build
from pipelines.models.weights import names_a_file, read_state_dict

NAME = "resnet8"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build(NAME, num_classes=4).state_dict()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loads(file, state, **options):
    loaded = build(NAME, file, num_classes=4, **options).state_dict()
    return all(torch.equal(loaded[key], value) for key, value in state.items())


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def as_lightning(state):
    return {
        "state_dict": prefixed("model.", state),
        "pytorch-lightning_version": "2.1",
        "callbacks": {},
        "loops": {"epoch": 3},
    }


CONTENTS = {
    "plain": lambda state: state,
    "torchvision's references": lambda state: {
        "model": state,
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")),
        "epoch": 3,
    },
    "timm's": lambda state: {
        "arch": NAME,
        "state_dict": state,
        "state_dict_ema": state,
        "metric": 71.2,
        "version": 2,
    },
    "a NumPy scalar": lambda state: {"state_dict": state, "best_acc1": np.float64(71.2), "step": np.int64(3)},
    "NumPy arrays beside it": lambda state: {
        "state_dict": state,
        "curve": np.arange(3.0),
        "rng": np.random.get_state(),
    },
    "a NumPy type": lambda state: {"state_dict": state, "dtype": np.dtype("float32")},
    "the tutorial's": lambda state: {
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}},
        "loss": torch.tensor(1.0),
    },
    "pytorch-cifar's": lambda state: {"net": state, "acc": 90.1},
    "network": lambda state: {"network": collections.OrderedDict(state)},
    "params": lambda state: {"params": state},
    "weights": lambda state: {"weights": state},
    "averages alone": lambda state: {"ema": {"module": state}, "decay": 0.99},
    "wrapped twice": lambda state: {"model": {"state_dict": prefixed("module.", state)}},
    "another name": lambda state: {
        "my_student": state,
        "optimizer": {"state": {0: {"m": torch.ones(1)}}, "param_groups": []},
    },
    "beside numbers": lambda state: {**state, "epoch": 3, "arch": "resnet"},
    "arrays": lambda state: {key: value.numpy() for key, value in state.items()},
    "parameters": lambda state: {
        key: nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()
    },
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled and parallel": lambda state: prefixed("module._orig_mod.", state),
    "parallel and compiled": lambda state: prefixed("_orig_mod.module.", state),
    "compiled in parts": lambda state: {
        key.replace("layer1.", "layer1._orig_mod."): value for key, value in state.items()
    },
    "Lightning's": as_lightning,
    "Lightning's, with a loss": lambda state: {
        "state_dict": {**prefixed("net.", state), "criterion.weight": torch.ones(4)}
    },
    "of its own wrapper": lambda state: {"state_dict": prefixed("wrapped.backbone.", state)},
    "averaged by torch": lambda state: {**prefixed("module.", state), "n_averaged": torch.tensor(3)},
    "harmless types": lambda state: {
        "state_dict": state,
        "when": datetime.datetime(2024, 1, 1),
        "config": types.SimpleNamespace(a=1, path=pathlib.PurePosixPath("/x")),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "last": collections.deque([1, 2], maxlen=3),
        "device": torch.device("cpu"),
        "version": torch.__version__,
    },
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_checkpoints_as_people_have_them(state, name, older):
    torch.save(CONTENTS[name](state), "checkpoint.pth", _use_new_zipfile_serialization=not older)
    assert loads("checkpoint.pth", state)


@pytest.mark.parametrize("suffix", ["ckpt", "pth.tar", "bin", "th", "model", "CKPT", "whatever", ""])
def test_a_local_file_is_read_by_its_content_whatever_its_name(state, suffix):
    for saved in ("torch", "safetensors"):
        name = f"{saved}.{suffix}".rstrip(".")
        torch.save(state, name) if saved == "torch" else safetensors.torch.save_file(state, name)
        assert loads(name, state)


def test_a_file_named_like_a_tag_is_the_file(state):
    shutil.copy(saved(state), "IMAGENET1K_V1")
    assert names_a_file("IMAGENET1K_V1")
    assert loads("IMAGENET1K_V1", state)
    assert not any(
        names_a_file(tag) for tag in ("DEFAULT", "pretrained", "ResNet18_Weights.IMAGENET1K_V1", "a1_in1k")
    )
    with pytest.raises(WeightsError, match=r"last\.ckpt: no such file"):
        build("resnet18", "last.ckpt")


def saved(content, name="saved.pth"):
    torch.save(content, name)
    return name


def test_weights_are_preferred_to_their_averages(state, caplog):
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    with caplog.at_level("INFO"):
        assert loads(saved({"state_dict_ema": other, "state_dict": state}), state)
    assert "taken from 'state_dict', not from state_dict_ema" in caplog.text


def test_optimisers_and_losses_beside_the_weights_are_not_looked_at(state):
    optimiser = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 3)
    assert loads(saved({"model": state, "scheduler": schedule, "criterion": nn.CrossEntropyLoss()}), state)


def test_objects_of_frameworks_are_not_looked_at(state):
    framework = types.ModuleType("omegaconf.dictconfig")
    framework.DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    attributes = types.ModuleType("pytorch_lightning.utilities.parsing")
    attributes.AttributeDict = type(
        "AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"}
    )
    config = framework.DictConfig()
    config.content = {"lr": 0.1}
    modules = {
        name: types.ModuleType(name)
        for name in ("omegaconf", "pytorch_lightning", "pytorch_lightning.utilities")
    }
    modules |= {framework.__name__: framework, attributes.__name__: attributes}
    with mock.patch.dict(sys.modules, modules):
        content = {
            "state_dict": state,
            "hyper_parameters": attributes.AttributeDict(lr=0.1),
            "config": config,
        }
        torch.save(content, "lightning.ckpt")
    assert loads("lightning.ckpt", state)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("opened",)


class Unknown:
    pass


@pytest.mark.parametrize("older", [False, True])
def test_what_would_run_code_is_refused_by_name(state, older):
    for content, name in ((Runs(), "posix.mkdir"), (Unknown(), "Unknown"), (build(NAME), "CifarResNet")):
        torch.save(
            {"state_dict": state, "more": content}, "bad.pth", _use_new_zipfile_serialization=not older
        )
        with pytest.raises(WeightsError, match=rf"bad\.pth: refused.*{name} would run code") as told:
            build(NAME, "bad.pth")
        assert "\n" not in str(told.value)
    assert not os.path.exists("opened")


def archive(**files):
    with zipfile.ZipFile("file", "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)


def programs(state):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "file")


WRONG = {
    "TorchScript": (programs, "a TorchScript program"),
    "an archive": (lambda state: archive(readme=b"x"), "an archive of readme"),
    "gzip": (lambda state: pathlib.Path("file").write_bytes(gzip.compress(b"x" * 100)), "gzip"),
    "a page": (lambda state: pathlib.Path("file").write_text("\n<!DOCTYPE html><html>"), "HTML"),
    "an LFS pointer": (
        lambda state: pathlib.Path("file").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "an index": (lambda state: pathlib.Path("file").write_text(json.dumps({"weight_map": {}})), "JSON"),
    "HDF5": (lambda state: pathlib.Path("file").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5"),
    "text": (
        lambda state: pathlib.Path("file").write_text("not weights at all"),
        "not a readable weights file",
    ),
    "nothing": (lambda state: pathlib.Path("file").touch(), "it is empty"),
    "a list": (lambda state: saved([1, 2], "file"), "It holds list"),
    "an optimiser": (
        lambda state: saved({"optimizer": {"lr": 0.1}, "epoch": 3}, "file"),
        r"no state dict .* It holds a dict of 2 \(optimizer: a dict of 1 \(lr: float\), epoch: int\)",
    ),
    "two networks": (
        lambda state: saved(
            {"state_dict": {**prefixed("student.", state), **prefixed("teacher.", state)}}, "file"
        ),
        r"several networks .* under 'student\.', 'teacher\.'",
    ),
    "two states": (
        lambda state: saved({"student": state, "teacher": state}, "file"),
        r"It holds a dict of 2 \(student: a dict of \d+ \(conv1.weight: \(16, 3, 3, 3\), ",
    ),
    "another network": (
        lambda state: saved(prefixed("model.", build("resnet14").state_dict()), "file"),
        r"do not fit .*unexpected: layer1\.1\.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_checkpoint_is_said_in_one_true_line(state, name):
    make, told = WRONG[name]
    make(state)
    with pytest.raises(WeightsError, match=rf"^weights \./file.*{told}") as error:
        build(NAME, "./file")
    assert "\n" not in str(error.value)


def test_damaged_files_end_in_one_line(state):
    saved(state)
    safetensors.torch.save_file(state, "saved.safetensors")
    torch.save({"a": torch.ones(1)}, "older.pth", _use_new_zipfile_serialization=False)
    generator = np.random.default_rng(0)
    for name in ("saved.pth", "saved.safetensors", "older.pth"):
        whole = pathlib.Path(name).read_bytes()
        for _ in range(10):
            content = bytearray(whole[: generator.integers(1, len(whole))])
            content[generator.integers(len(content))] ^= 0xFF
            pathlib.Path("broken").write_bytes(content)
            with pytest.raises(WeightsError, match=r"^weights \./broken: [^\n]*$"):
                build(NAME, "./broken")


def test_a_folder_is_answered_with_what_is_in_it(state):
    os.mkdir("hub")
    saved(state, "hub/pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"hub: a folder; name a file in it \(pytorch_model.bin\)"):
        read_state_dict("hub")
    with pytest.raises(WeightsError, match="hub/: a folder"):
        build(NAME, "hub/")


def test_a_tag_that_is_not_there_is_told_from_a_file():
    with pytest.raises(WeightsError, match="'best' of resnet18: neither a tag that it has nor a file here"):
        build("resnet18", "best")
