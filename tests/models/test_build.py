import dataclasses
import logging
import os
import pickle
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelines.bcos import fade_biases, is_bias, set_b
from pipelines.errors import UserError
from pipelines.models import ModelSpec, WeightsError, assemble, build, load, read_spec, save
from pipelines.storage.publish import publish

SHARED = Path(os.environ.get("BCOS_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.th"
    state = {f"module.{key}": value for key, value in build("resnet8").state_dict().items()}
    torch.save({"state_dict": state}, path)
    return path


def test_names_of_every_library():
    assert type(build("resnet20")).__name__ == "CifarResNet"
    assert type(build("cifar_resnet32")).__name__ == "CifarResNet"
    assert type(build("resnet18", num_classes=3)).__module__ == "torchvision.models.resnet"
    assert type(build("torchvision:resnet18", num_classes=3)).__module__ == "torchvision.models.resnet"
    assert type(build("timm:resnet18", num_classes=3)).__module__ == "timm.models.resnet"
    assert build("test_resnet", num_classes=3)(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"unknown model 'resnet8o'.*resnet"):
        build("resnet8o")


def test_options_reach_the_constructor():
    images = torch.rand(1, 3, 64, 64)
    narrow, strided = build("resnet8", options={"width": 4}), build("resnet8", options={"stem_stride": 2})
    assert narrow.linear.in_features == 16
    assert strided.pool(strided.conv1(images)).shape[-1] == 32


@pytest.mark.parametrize("stride", [2, 4])
def test_each_pixel_counts_equally(stride):
    """So the gradient of a part's sum, with equal weights, shows no grid away from the border."""
    network = build("resnet8", options={"stem_stride": stride})
    pool, first = network.layer2[:2]
    for part in (
        torch.nn.Sequential(network.conv1, network.pool),
        torch.nn.Sequential(pool, first.conv1),
        torch.nn.Sequential(pool, first.downsample),
    ):
        for conv in part.modules():
            if isinstance(conv, torch.nn.Conv2d):
                torch.nn.init.ones_(conv.weight)
        maps = torch.zeros(1, getattr(part[0], "in_channels", 16), 32, 32, requires_grad=True)
        part(maps).sum().backward()
        inside = maps.grad[0, :, 8:-8, 8:-8]
        assert (inside == inside[0, 0, 0]).all()


def test_without_a_stride_of_the_stem_the_network_is_the_papers():
    network = build("resnet8")
    assert {tuple(conv.kernel_size) for conv in network.modules() if isinstance(conv, torch.nn.Conv2d)} == {
        (3, 3)
    }
    maps = torch.rand(1, 16, 8, 8)
    assert network.layer2[0].downsample(maps)[:, 8:24].equal(maps[:, :, ::2, ::2])
    with pytest.raises(ValueError, match=r"at least 1, not 0"):
        build("resnet8", options={"stem_stride": 0})


def test_published_weights_of_the_cifar_network():
    path = SHARED / "weights/cifar10/resnet20-12fca82f.th"
    if not path.is_file():
        pytest.skip("the CIFAR weights are not at hand")
    digest = sha256(path.read_bytes()).hexdigest()
    model = build("resnet20", str(path), sha256=digest)
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    assert all(torch.equal(value, state[f"module.{key}"]) for key, value in model.named_parameters())
    assert torch.equal(model.bn1.running_var, state["module.bn1.running_var"])


def test_safetensors_and_torch_files_give_the_same_network(weights, tmp_path):
    one = build("resnet8", str(weights))
    safetensors.torch.save_file(one.state_dict(), tmp_path / "weights.safetensors")
    other = build("resnet8", str(tmp_path / "weights.safetensors"))
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_other_classes_get_a_new_head_and_the_log_says_so(weights, caplog):
    with caplog.at_level(logging.WARNING):
        model = build("resnet8", str(weights), num_classes=3)
    assert model.linear.out_features == 3
    assert "10 classes" in caplog.text
    assert "new one with 3" in caplog.text
    caplog.clear()
    build("resnet8", str(weights), num_classes=10)
    assert not caplog.text


def test_every_wrong_key_is_listed(weights):
    content = torch.load(weights, weights_only=True)
    state = content["state_dict"]
    del state["module.bn1.weight"], state["module.layer1.0.conv1.weight"]
    state["module.more"] = torch.zeros(1)
    state["module.conv1.weight"] = torch.zeros(2, 3)
    torch.save(content, weights)
    with pytest.raises(WeightsError) as told:
        build("resnet8", str(weights))
    message = str(told.value)
    assert "missing: bn1.weight, layer1.0.conv1.weight" in message
    assert "unexpected: more" in message
    assert "misshaped: conv1.weight (2, 3) instead of (16, 3, 3, 3)" in message
    assert "\n" not in message


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "weights.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(WeightsError, match=name):
            build("resnet8", f"./{name}")
    assert not Path("opened").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", None])
def test_unreadable_and_missing_files_are_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        WeightsError, match=r"weights\.safetensors: not a readable|weights\.safetensors: no such file"
    ):
        build("resnet8", str(path))


def test_another_sha256_is_refused_before_reading(weights):
    with pytest.raises(WeightsError, match=r"sha256 is .* was expected"):
        build("resnet8", str(weights), sha256="0" * 64)


def test_unknown_tags_are_named():
    with pytest.raises(WeightsError, match="NEWEST"):
        build("resnet18", "NEWEST")
    with pytest.raises(WeightsError, match="no tagged weights"):
        build("resnet20", "DEFAULT")


@pytest.mark.parametrize("kind", ["conventional", "bcos"])
def test_a_saved_model_gives_the_same_logits(tmp_path, kind):
    design = {"b": 1.5, "logit_bias": -1.0} if kind == "bcos" else {}
    spec = ModelSpec("resnet8", ("a", "b", "c"), 32, kind, options={"width": 4}, design=design)
    model, images = assemble(spec), torch.rand(4, 6, 32, 32)
    model.train()(images)  # statistics that are not the initial ones
    save(tmp_path, model, spec)
    loaded, read = load(tmp_path)
    took_effect = {**design, "stem_pool": "keep"} if kind == "bcos" else {}
    assert took_effect.items() <= read.design.items()
    assert read == read_spec(tmp_path) == dataclasses.replace(spec, design=read.design)
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize(
    ("b", "share", "wanted"),
    [
        (2.0, 0.0, {"b": 2.0, "b_mode": "fixed", "bias": "remove"}),
        (1.5, 0.25, {"b": 1.5, "b_mode": "fixed", "bias": "fade"}),
    ],
)
def test_a_saved_model_has_no_schedules_of_training(tmp_path, b, share, wanted):
    design = {"b": 1.0, "b_mode": "scheduled", "bias": "fade"}
    spec = ModelSpec("resnet8", ("a", "b", "c"), 32, "bcos", options={"width": 4}, design=design)
    model, images = assemble(spec), torch.rand(4, 6, 32, 32)
    set_b(model, b)
    fade_biases(model, share)
    model.train()(images)
    save(tmp_path, model, spec)
    loaded, read = load(tmp_path)
    assert wanted.items() <= read.design.items()
    assert not any(name.endswith("b_value") for name, _ in loaded.named_buffers())
    assert any(is_bias(name) for name, _ in loaded.named_parameters()) == (share > 0)
    torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_model_is_loaded_from_a_url(tmp_path, protocol):
    spec = ModelSpec("resnet8", ("a", "b"), 32, "bcos")
    model = assemble(spec).eval()
    save(tmp_path / "here", model, spec)
    there = publish(tmp_path / "here", f"{protocol}://{tmp_path}/there", ("model.json", "model.safetensors"))
    loaded, of_loaded = load(there)
    assert of_loaded == dataclasses.replace(spec, design=model.design)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_conventional_model_normalises_its_first_three_channels():
    spec = ModelSpec("resnet8", ("a", "b"), 32, "conventional")
    network, images = build("resnet8", num_classes=2).eval(), torch.rand(2, 6, 32, 32)
    model = assemble(spec, network)
    normalised = (images[:, :3] - model.mean[:3].view(3, 1, 1)) / model.std[:3].view(3, 1, 1)
    torch.testing.assert_close(model(images), network(normalised))
    with pytest.raises(ValueError, match="add_inverse"):
        model(images[:, :3])


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\0\0", b'{"name": "resnet8"'])
def test_a_damaged_description_of_a_model_is_one_line(tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]*model\.json: not [^\n]*$"):
        read_spec(tmp_path)
