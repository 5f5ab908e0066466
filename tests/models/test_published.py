"""Published checkpoints: every key finds its place, and the network computes the papers' formulas.

The files themselves are too large for tests. Instead, a reference computes the logits by the papers' formulas
from tensors with the published names and shapes, which `Weights` draws when the reference first asks for
them. The project's model with the same tensors must give the same logits.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from pipelines.bcos import add_inverse
from pipelines.models import ModelError, WeightsError, assemble, build, load, load_published, save
from pipelines.models.published import PUBLICATIONS, published_spec, translated

NAMES = [
    f"{publication}:{architecture}"
    for publication, what in PUBLICATIONS.items()
    for architecture in what.architectures
]
MEAN, STD = [0.485, 0.456, 0.406, 0.515, 0.544, 0.594], [0.229, 0.224, 0.225] * 2


class Weights(dict):
    """A state dict that draws tensors on demand, for B-cosification (`bcosified`) or B-cos-v2."""

    def __init__(self, bcosified, prefix=""):
        super().__init__()
        self.bcosified, self.prefix = bcosified, prefix

    def draw(self, name, *shape, low=None):
        """The tensor `name` in float64, drawn at first use: normal (norm of rows ≈ 1), or from [low, 2]."""
        key = self.prefix + name
        if key not in self:
            self[key] = (
                torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
                if low is None
                else torch.empty(shape).uniform_(low, 2)
            )
        return self[key].double()

    def bcos(self, name, x, units, kernel=1, stride=1, padding=0, groups=1):
        """|w·x|·(w·x)/‖x‖ for each patch; w of norm 1 for B-cos-v2."""
        weight = self.draw(f"{name}.linear.weight", units, x.shape[1] // groups, kernel, kernel)
        if not self.bcosified:
            weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        out = F.conv2d(x, weight, None, stride, padding, groups=groups)
        patches = F.conv2d(x.square(), torch.ones_like(weight), None, stride, padding, groups=groups)
        return out * out.abs() / (patches + 1e-6).sqrt()

    def bcos_linear(self, name, x, units):
        weight = self.draw(f"{name}.linear.weight", units, x.shape[-1])
        if not self.bcosified:
            weight = weight / weight.square().sum(1, keepdim=True).sqrt()
        out = x @ weight.T
        return out * out.abs() / (x.square().sum(-1, keepdim=True).sqrt() + 1e-12)

    def batch_norm(self, name, x):
        """γ·x/σ, with the running variance set to the batch's; the running mean is not used."""
        self.draw(f"{name}.running_mean", x.shape[1])
        self[f"{self.prefix}{name}.num_batches_tracked"] = torch.tensor(7)
        self[f"{self.prefix}{name}.running_var"] = x.var((0, 2, 3), correction=0).float()
        var = self.draw(f"{name}.running_var")
        weight = self.draw(f"{name}.weight", x.shape[1], low=0.5)
        return x * (weight / (var + 1e-5).sqrt())[:, None, None]

    def layer_norm(self, name, x, eps=1e-5):
        """γ·(x - μ)/σ over the last dimension."""
        centred = x - x.mean(-1, keepdim=True)
        scale = (
            self.draw(f"{name}.weight", x.shape[-1], low=0.5)
            / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        )
        return centred * scale

    def activation(self, x):
        return x.relu() if self.bcosified else x

    def normalised(self, images):
        mean, std = (torch.tensor(values, dtype=images.dtype)[:, None, None] for values in (MEAN, STD))
        return (images - mean) / std if self.bcosified else images

    def stem(self, names, images, channels):
        x = self.bcos(names[0], self.normalised(images), channels, 7, 2, 3)
        return F.avg_pool2d(self.activation(self.batch_norm(names[1], x)), 3, 2, 1)


def resnet(weights, images, depths, bottleneck, groups=1, width=64):
    x = weights.stem(("conv1", "bn1"), images, 64)
    for stage, depth in enumerate(depths):
        planes = 64 * 2**stage
        for block in range(depth):
            at = f"layer{stage + 1}.{block}"
            stride = 2 if stage and not block else 1
            inner = planes * width * groups // 64
            layers = (
                [(inner, 1, 1, 1), (inner, 3, stride, groups), (4 * planes, 1, 1, 1)]
                if bottleneck
                else [(planes, 3, stride, 1), (planes, 3, 1, 1)]
            )
            out = x
            for index, (units, kernel, step, split) in enumerate(layers, 1):
                out = weights.bcos(f"{at}.conv{index}", out, units, kernel, step, kernel // 2, split)
                out = weights.batch_norm(f"{at}.bn{index}", out)
                out = weights.activation(out) if index < len(layers) else out
            if x.shape != out.shape:
                x = weights.bcos(f"{at}.downsample.0", x, out.shape[1], 1, stride)
                x = weights.batch_norm(f"{at}.downsample.1", x)
            x = weights.activation(x + out)
    return weights.bcos("fc", x, 1000).mean((2, 3))


def densenet(weights, images, depths, growth, channels):
    parts = ["conv0", "norm0", "relu0", "pool0"]  # children of `features`; B-cosification's keys have indices
    for stage in range(4):
        parts += [f"denseblock{stage + 1}", f"transition{stage + 1}" if stage < 3 else "norm5"]

    def at(part):
        return f"features.{parts.index(part) if weights.bcosified else part}"

    norm, conv = ("0", "2") if weights.bcosified else ("norm", "conv")
    x = weights.stem((at("conv0"), at("norm0")), images, channels)
    for stage, depth in enumerate(depths):
        for layer in range(depth):
            name = f"{at(f'denseblock{stage + 1}')}.denselayer{layer + 1}"
            out = weights.activation(weights.batch_norm(f"{name}.norm1", x))
            out = weights.bcos(f"{name}.conv1", out, 4 * growth)
            out = weights.activation(weights.batch_norm(f"{name}.norm2", out))
            x = torch.cat([x, weights.bcos(f"{name}.conv2", out, growth, 3, 1, 1)], 1)
        if stage < 3:
            name = at(f"transition{stage + 1}")
            x = weights.activation(weights.batch_norm(f"{name}.{norm}", x))
            x = F.avg_pool2d(weights.bcos(f"{name}.{conv}", x, x.shape[1] // 2), 2)
    x = weights.activation(weights.batch_norm(at("norm5"), x))
    return weights.bcos("classifier", x, 1000).mean((2, 3))


def convnext(weights, images, depths, channels):
    def norm(name, x):
        return weights.layer_norm(name, x.movedim(1, -1), 1e-6).movedim(-1, 1)

    x = norm("features.1", weights.bcos("features.0", images, channels[0], 4, 4))
    for stage, depth in enumerate(depths):
        if stage:
            x = norm(f"features.{2 * stage + 1}.0", x)
            x = weights.bcos(f"features.{2 * stage + 1}.1", x, channels[stage], 2, 2)
        for block in range(depth):
            at, width = f"features.{2 * stage + 2}.{block}", channels[stage]
            out = norm(f"{at}.block.1", weights.bcos(f"{at}.block.0", x, width, 7, 1, 3, width))
            out = weights.bcos(f"{at}.block.3", weights.bcos(f"{at}.block.2", out, 4 * width), width)
            x = x + weights.draw(f"{at}.layer_scale", width, 1, 1, low=0.5) * out
    return weights.bcos("classifier.1", norm("classifier.0", x), 1000).mean((2, 3))


def vit(weights, images, width, depth, stem=()):
    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2 if weights.bcosified else x

    x, side = weights.normalised(images), 1 if stem else 16
    for index, channels in enumerate(stem):
        name = f"to_patch_embedding.conv_stem.{3 * index}"
        x = weights.bcos(name, x, channels, 3, 2 if channels > (3, *stem)[index] else 1, 1)
        centred = x - x.mean((1, 2, 3), keepdim=True)
        scale = weights.draw(f"to_patch_embedding.conv_stem.{3 * index + 1}.weight", channels, low=0.5)[
            :, None, None
        ]
        x = gelu(scale * centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt())
    rows, columns = x.shape[2] // side, x.shape[3] // side
    tokens = [  # row, column, channel of each pixel of a patch
        x[:, :, side * row : side * (row + 1), side * column : side * (column + 1)]
        .permute(0, 2, 3, 1)
        .flatten(1)
        for row in range(rows)
        for column in range(columns)
    ]
    x = weights.bcos_linear("to_patch_embedding.linear", torch.stack(tokens, 1), width)
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4 - 1))
    angles = [(column * frequencies, row * frequencies) for row in range(rows) for column in range(columns)]
    x = x + torch.stack([torch.cat([a.sin(), a.cos(), b.sin(), b.cos()]) for a, b in angles]).to(x)
    for block in range(depth):
        at = f"transformer.encoder_{block}"
        inner = weights.layer_norm(f"{at}.attn.norm", x)
        q, k, v = (inner @ weights.draw(f"{at}.attn.to_qkv.weight", 3 * width, width).T).chunk(3, -1)
        heads = []
        for head in range(width // 64):
            of_head = slice(64 * head, 64 * (head + 1))
            matrix = (q[..., of_head] @ k[..., of_head].transpose(1, 2) / 8).softmax(-1)
            heads.append(matrix @ v[..., of_head])
        x = x + weights.bcos_linear(f"{at}.attn.to_out", torch.cat(heads, -1), width)
        inner = weights.bcos_linear(
            f"{at}.ff.net.linear1", weights.layer_norm(f"{at}.ff.net.norm", x), 4 * width
        )
        x = x + weights.bcos_linear(f"{at}.ff.net.linear2", gelu(inner), width)
    if not weights.bcosified:
        x = x.mean(1, keepdim=True)
    return weights.bcos_linear("linear_head.linear", weights.layer_norm("linear_head.norm", x), 1000).mean(1)


RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
    "resnext50_32x4d": ((3, 4, 6, 3), True, 32, 4),
}
DENSENETS = {
    "densenet121": ((6, 12, 24, 16), 32, 64),
    "densenet161": ((6, 12, 36, 24), 48, 96),
    "densenet169": ((6, 12, 32, 32), 32, 64),
    "densenet201": ((6, 12, 48, 32), 32, 64),
}
CONVNEXTS = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
}
VITS = {
    "simple_vit_ti": (192, 12),
    "simple_vit_s": (384, 12),
    "simple_vit_b": (768, 12),
    "simple_vit_l": (1024, 14),
    "vitc_ti": (192, 11, (24, 48, 96, 192)),
    "vitc_s": (384, 11, (48, 96, 192, 384)),
    "vitc_b": (768, 11, (64, 128, 128, 256, 256, 512)),
    "vitc_l": (1024, 13, (64, 128, 128, 256, 256, 512)),
}


def published(name, images):
    """A state dict with the published names and shapes, and the logits (N, 1000) of its network."""
    publication, architecture = name.split(":")
    prefix = "model.model." if publication == "b-cosification" else "0." if architecture in VITS else ""
    weights = Weights(publication == "b-cosification", prefix)
    (formula, sizes) = next(pair for pair in FAMILIES if architecture in pair[1])
    logits = formula(weights, images, *sizes[architecture]) - math.log(999)
    return dict(weights), logits


FAMILIES = ((resnet, RESNETS), (densenet, DENSENETS), (convnext, CONVNEXTS), (vit, VITS))


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A file like B-cos-v2's ResNet-18."""
    path = tmp_path_factory.mktemp("published") / "resnet_18-68b4160fff.pth"
    with torch.no_grad():
        torch.save(published("b-cos-v2:resnet18", torch.rand(2, 6, 64, 64).double())[0], path)
    return str(path)


@pytest.mark.parametrize("publication", PUBLICATIONS)
def test_every_published_key_of_every_model_finds_its_place(publication):
    for architecture in PUBLICATIONS[publication].architectures:
        name = f"{publication}:{architecture}"
        with torch.device("meta"):
            state, _ = published(name, torch.rand(2, 6, 64, 64).double())
            own = assemble(published_spec(name)).state_dict()
        found = translated(name, state, "file")
        assert {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in own.items()
        }, name


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"b-cos-v2:{architecture}"
            for architecture in ("resnet18", "resnext50_32x4d", "densenet121", "convnext_tiny")
        ),
        *(
            f"{publication}:{architecture}"
            for publication in PUBLICATIONS
            for architecture in ("simple_vit_ti", "vitc_ti")
        ),
        *(f"b-cosification:{architecture}" for architecture in ("resnet18", "densenet121")),
    ],
)
def test_the_network_computes_what_the_published_formulas_say(name, tmp_path):
    torch.manual_seed(0)
    images = add_inverse(torch.rand(2, 3, 64, 96, dtype=torch.float64))
    with torch.no_grad():
        state, expected = published(name, images)
        torch.save({"state_dict": state, "epoch": 89}, tmp_path / "last.ckpt")
        model, _ = load_published(name, str(tmp_path / "last.ckpt"))
        found = model.double()(images)
    assert not model.training
    assert (found - expected).abs().max() <= 1e-5 * (expected + math.log(999)).abs().max()


@pytest.mark.parametrize("architecture", VITS)
def test_the_ordinary_vits_of_bcos_v2_have_the_names_of_this_projects(architecture):
    with torch.device("meta"):
        state, _ = published(f"b-cosification:{architecture}", torch.rand(2, 6, 64, 64).double())
        own = build(architecture).state_dict()
    ordinary = {}
    for key, value in state.items():
        name = key.removeprefix("model.model.").removesuffix(".weight")
        layer = name.removesuffix(".linear")  # the ordinary layer in a B-cos layer
        ordinary[f"{layer}.weight"] = value.shape
        if not layer.endswith(("to_qkv", "to_out")):
            ordinary[f"{layer}.bias"] = value.shape[:1]
    first = (
        "to_patch_embedding.conv_stem.0.weight"
        if "vitc" in architecture
        else "to_patch_embedding.linear.weight"
    )
    width, inputs, *kernel = ordinary[first]
    ordinary[first] = (width, inputs // 2, *kernel)  # three channels
    assert {key: tuple(value.shape) for key, value in own.items()} == {
        key: tuple(shape) for key, shape in ordinary.items()
    }


def test_a_saved_one_is_the_same_model_and_its_input_is_not_normalised(resnet18, tmp_path):
    model, spec = load_published("b-cos-v2:resnet18", resnet18)
    save(tmp_path, model, spec)
    again, read = load(tmp_path)
    images = torch.rand(2, 6, 64, 64)
    assert torch.equal(model(images), again(images))
    assert read == spec
    assert (spec.kind, spec.name, len(spec.classes)) == ("bcos", "resnet18", 1000)
    assert again.mean.tolist() == [0] * 6
    assert again.std.tolist() == [1] * 6


def test_a_file_of_another_network_is_refused_in_one_short_line(resnet18):
    for name in (
        "b-cos-v2:resnet50",
        "b-cos-v2:densenet121",
        "b-cos-v2:simple_vit_ti",
        "b-cosification:resnet18",
    ):
        with pytest.raises(WeightsError, match=rf"resnet_18-68b4160fff\.pth of {name}") as told:
            load_published(name, resnet18)
        assert len(str(told.value)) < 1000
        assert "\n" not in str(told.value)


def test_names_and_classes_that_were_not_published(resnet18):
    with pytest.raises(ModelError, match=r"b-cos-v2:resnet19.*near it: b-cos-v2:resnet18"):
        load_published("b-cos-v2:resnet19", resnet18)
    with pytest.raises(ModelError, match="1000 classes of ImageNet, not for 10"):
        load_published("b-cos-v2:resnet18", resnet18, classes=tuple("abcdefghij"))
