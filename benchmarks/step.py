"""Cost of a B-cos network relative to the plain network that it was made from.

    python -m benchmarks.step [--case resnet18-112 ...] [--mode eager compiled] [--rounds 9]

Three networks take turns, so that other processes on the machine disturb all of them alike:

- `plain`: the ordinary network;
- `bcos`: its B-cosified version;
- `formula` (eager only): `bcos` with layers that spell out their formulas in plain autograd operations.

Measures a training step (forward and backward pass), inference, `dynamic_weights` (for `plain`, forward pass
and input gradient; parameters are frozen in both), the explanation of 20 classes at once relative to 20
calls, and the bytes that a training step saves for its backward pass. Prints one line of JSON per case and
mode, then a table. Figures are ratios to `plain`, medians over the rounds. Needs torch, torchvision and timm.
With a GPU, it runs in bfloat16 at the image sizes of ImageNet.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, in_turns, main, milliseconds, ratio
from pipelines.bcos import BcosBatchNorm, BcosConv2d, BcosLinear, bcosify, dynamic_weights
from pipelines.bcos.fused import set_up_compiler
from pipelines.models import ConventionalNetwork, build

CLASSES = 20
CASES = {
    "cpu": {
        "resnet20-32": Case("resnet20", 32, 64),
        "resnet18-112": Case("resnet18", 112, 16),
        "resnet50-112": Case("resnet50", 112, 8),
    },
    "cuda": {
        "resnet18-224": Case("resnet18", 224, 128),
        "resnet50-224": Case("resnet50", 224, 128),
        "vit_b_16-224": Case("vit_b_16", 224, 128),
    },
}


class FormulaConv2d(BcosConv2d):
    """The B-cos convolution |w·x|·(w·x)/‖x‖, spelt out in plain operations."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        linear = nn.functional.conv2d(
            x_NCHW, self.weight, None, self.stride, self.padding, self.dilation, self.groups
        )
        squares = (x_NCHW**2).sum(1, keepdim=True)
        window = (self.kernel_size, self.stride, self.padding)
        sums = nn.functional.avg_pool2d(squares, *window, divisor_override=1)  # type: ignore[arg-type]
        return linear * self.hold(linear.abs() / (sums + 1e-6).sqrt())


class FormulaLinear(BcosLinear):
    """The B-cos linear layer, spelt out in plain operations."""

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear(x, self.weight)
        return linear * self.hold(linear.abs() / (x.norm(dim=-1, keepdim=True) + 1e-12))


class FormulaBatchNorm(BcosBatchNorm):
    """The uncentred BatchNorm, spelt out in plain operations."""

    def forward(self, x: Tensor) -> Tensor:
        var = x.var((0, 2, 3), unbiased=False) if self.training else self.running_var
        if self.training:
            self._track(var, var)
        assert self.weight is not None
        return self.weight[:, None, None] * x / self.hold((var + self.eps).sqrt())[:, None, None]


FORMULAS = {BcosConv2d: FormulaConv2d, BcosLinear: FormulaLinear, BcosBatchNorm: FormulaBatchNorm}


def keep_small_features(model: nn.Module) -> nn.Module:
    """Lets the norms of `model` scale even tiny features to standard deviation 1, as in trained networks.

    With random weights, features are tiny at B = 2, and computing with denormal numbers is slow.
    """
    for module in model.modules():
        if isinstance(module, BcosBatchNorm):
            module.eps = 1e-20
    return model


def networks(case: Case, device: str, mode: str, channels_last: bool) -> dict[str, nn.Module]:
    """The networks to compare, with the same weights; in mode `compiled`, compiled as for training."""
    torch.manual_seed(0)
    source = build(case.network, num_classes=CLASSES)
    bcos = keep_small_features(bcosify(source))
    found: dict[str, nn.Module] = {"plain": ConventionalNetwork(source), "bcos": bcos}
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in bcos.modules())
    if mode == "eager" and not grouped:
        found["formula"] = copy.deepcopy(bcos)
        for module in found["formula"].modules():
            module.__class__ = FORMULAS.get(type(module), type(module))
    for model in found.values():
        model.to(device)
        if channels_last or mode == "compiled":
            model.to(memory_format=torch.channels_last)
        if mode == "compiled":
            set_up_compiler()
            model.compile(fullgraph=True, dynamic=False)
    return found


def train_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Runs a forward and a backward pass, without an optimiser step."""
    model.train().requires_grad_(True).zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(images), labels).backward()


@torch.no_grad()
def infer(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Runs a forward pass without gradients."""
    model.eval()(images)


def explain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Computes dynamic weights or, for a plain network, the gradient of the label's logit by the input."""
    model.eval().requires_grad_(False)
    if not isinstance(model, ConventionalNetwork):
        dynamic_weights(model, images, labels)
        return
    images = images.detach().requires_grad_()
    torch.autograd.grad(model(images).gather(1, labels[:, None]).sum(), images)


MEASURES = {"training_step": train_step, "inference": infer, "dynamic_weights": explain}


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that a training step saves for its backward pass, without parameters, buffers and images."""
    model.train().requires_grad_(True)
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(images)
    for tensor in (*model.parameters(), *model.buffers(), images):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del logits
    return sum(storages.values())


def many_classes(model: nn.Module, images: Tensor, rounds: int) -> float:
    """Time to explain 20 classes per image at once, relative to 20 calls with one class per image."""
    model.eval().requires_grad_(False)
    targets = torch.stack([torch.randperm(CLASSES, device=images.device) for _ in images])

    def one_by_one() -> None:
        for column in targets.unbind(1):
            dynamic_weights(model, images, column)

    ways: dict[str, Callable[[], Any]] = {
        "at once": partial(dynamic_weights, model, images, targets),
        "one by one": one_by_one,
    }
    return ratio(in_turns(ways, max(1, rounds // 3)), "at once", "one by one")


def measure(case: Case, device: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures one case; one line of figures per mode."""
    for mode in options.mode:
        torch.compiler.reset()
        models = networks(case, device, mode, options.channels_last)
        images = torch.rand(case.batch, 6, case.size, case.size, device=device)
        if options.channels_last or mode == "compiled":
            images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(CLASSES, (case.batch,), device=device)
        line: dict[str, Any] = {"mode": mode}
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            for what, function in MEASURES.items():
                steps = {key: partial(function, model, images, labels) for key, model in models.items()}
                turns = in_turns(steps, options.rounds)
                line[f"{what}_plain_ms"] = milliseconds(turns, "plain")
                line |= {f"{what}_{key}": ratio(turns, key, "plain") for key in list(models)[1:]}
            kept = {key: saved_bytes(model, images, labels) for key, model in models.items()}
            line["saved_plain_mb"] = round(kept["plain"] / 1e6, 1)
            line |= {f"saved_{key}": round(kept[key] / kept["plain"], 3) for key in list(models)[1:]}
            line["twenty_classes_at_once"] = many_classes(models["bcos"], images, options.rounds)
        yield line


if __name__ == "__main__":
    main(__doc__, CASES, measure, rounds=9)
