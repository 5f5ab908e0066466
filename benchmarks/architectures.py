"""Correctness and cost of the conversion for each architecture, at random weights.

    python -m benchmarks.architectures [--write docs/architectures.md] [--only resnet18 ...] [--threads 2]

Measures, per architecture:

- the relative difference that `convert` makes to the logits (float32, evaluation mode);
- the unexplained share after `bcosify`;
- the number of audit findings;
- the cost of a forward pass and of a training step, B-cos relative to plain (eager, in turns, medians).

open_clip's image towers have no classes, so the entries of their embedding are explained like logits. Exits
with status 1 if a relative difference, or the unexplained share of a network without constants, exceeds its
limit, or if an audit has findings. Runs on the CPU; needs torch, torchvision, timm and open_clip.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import step
from benchmarks.harness import in_turns, milliseconds, ratio
from benchmarks.markdown import table
from pipelines.bcos import BcosNetwork, add_inverse, audit, bcosify, dynamic_weights
from pipelines.models import ConventionalNetwork, build
from tests.support.families import conversion_difference, normalised, pictures, settle, shake

CLASSES, ROUNDS = 10, 5
LIMIT = 1e-4  # of the relative difference and of the unexplained share


@dataclass(frozen=True)
class Case:
    """An architecture, and the images on which it is measured."""

    name: str
    family: str
    size: int = 64  # side of the images in pixels
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the network's constructor
    batch: int = 4


def vit(name: str, family: str, **options: Any) -> Case:
    """A case whose constructor takes the side of the images as an argument."""
    return Case(
        name, family, options={("img_size" if name.startswith("timm:") else "image_size"): 64, **options}
    )


CASES = [
    Case("resnet20", "ResNet (CIFAR)", 32),
    Case("resnet18", "ResNet"),
    Case("resnet50", "ResNet"),
    Case("resnext50_32x4d", "ResNeXt"),
    Case("wide_resnet50_2", "Wide ResNet"),
    Case("densenet121", "DenseNet"),
    Case("vgg11_bn", "VGG"),
    Case("mobilenet_v2", "MobileNet v2"),
    Case("mobilenet_v3_small", "MobileNet v3"),
    Case("mobilenet_v3_large", "MobileNet v3"),
    Case("efficientnet_b0", "EfficientNet"),
    Case("efficientnet_v2_s", "EfficientNet v2"),
    Case("regnet_x_400mf", "RegNet"),
    Case("regnet_y_400mf", "RegNet with squeeze-excitation"),
    Case("convnext_tiny", "ConvNeXt"),
    vit("vit_b_16", "ViT"),
    Case("swin_t", "Swin"),
    Case("swin_v2_t", "Swin v2"),
    Case("maxvit_t", "MaxViT", 224, batch=1),
    Case("googlenet", "GoogLeNet", options={"aux_logits": False, "init_weights": False}),
    Case("inception_v3", "Inception v3", 160, {"aux_logits": False, "init_weights": False}),
    Case("shufflenet_v2_x1_0", "ShuffleNet v2"),
    Case("squeezenet1_1", "SqueezeNet"),
    Case("mnasnet1_0", "MNASNet"),
    Case("timm:resnet18d", "ResNet-D"),
    Case("timm:seresnet18", "ResNet with squeeze-excitation"),
    Case("timm:ecaresnet50t", "ResNet with channel attention"),
    Case("timm:resnext26ts", "ResNeXt"),
    Case("timm:densenet121", "DenseNet"),
    Case("timm:mobilenetv3_small_100", "MobileNet v3"),
    Case("timm:efficientnet_lite0", "EfficientNet"),
    Case("timm:tf_efficientnetv2_b0", "EfficientNet v2"),
    Case("timm:regnety_002", "RegNet"),
    Case("timm:convnext_atto", "ConvNeXt"),
    Case("timm:convnextv2_atto", "ConvNeXt v2"),
    vit("timm:vit_tiny_patch16_224", "ViT"),
    vit("timm:deit_tiny_patch16_224", "DeiT"),
    vit("timm:deit_tiny_distilled_patch16_224", "DeiT, distilled"),
    vit("timm:deit3_small_patch16_224", "DeiT III"),
    vit("timm:swin_tiny_patch4_window7_224", "Swin", window_size=2),
    vit("timm:swinv2_tiny_window8_256", "Swin v2", window_size=2),
    Case("timm:maxvit_pico_rw_256", "MaxViT", options={"img_size": 64}),
    Case("timm:efficientformer_l1", "EfficientFormer", 224, batch=2),
    vit("timm:efficientformerv2_s0", "EfficientFormer v2"),
    Case("open_clip:RN50", "CLIP's ResNet", options={"image_size": 64}),
    Case("open_clip:RN50x4", "CLIP's ResNet", 96, {"image_size": 96}, batch=2),
    Case("open_clip:ViT-B-32", "CLIP's ViT", 96, {"image_size": 96}, batch=2),
    Case("open_clip:ViT-B-16-SigLIP", "SigLIP's ViT", 224, batch=1),
    Case("simple_vit_ti", "SimpleViT"),
    Case("vitc_ti", "ViT-C"),
]


@dataclass(frozen=True)
class Measured:
    """The figures of one architecture: one line of the report."""

    case: Case
    parameters: int
    difference: float  # largest difference of logits that `convert` makes, relative to the largest logit
    share: float  # unexplained share of the mean-referenced maps
    constant: bool  # tokens or position embeddings add constants that no pixel carries
    findings: list[str]  # of the audit
    forward: float  # time of a forward pass, B-cos / plain
    step: float  # time of a training step, B-cos / plain
    plain_step: float  # milliseconds of the plain training step

    def failures(self) -> list[str]:
        """Audit findings, and descriptions of figures that exceed their limit."""
        found = list(self.findings)
        if not self.difference <= LIMIT:
            found.append(f"convert changes the logits by {self.difference:.1e}")
        if not self.constant and not self.share <= LIMIT:
            found.append(f"a share of {self.share:.1e} is unexplained")
        return found


def measure(case: Case, rounds: int = ROUNDS) -> Measured:
    """Measures one architecture on a batch of random pictures."""
    torch.manual_seed(0)
    many = pictures(4 * case.batch, case.size)
    images, six = many[: case.batch], add_inverse(many[: case.batch])
    classes = None if case.name.startswith("open_clip:") else CLASSES
    source = settle(shake(build(case.name, num_classes=classes, options=case.options)), normalised(many))
    difference = conversion_difference(source, images)
    network = bcosify(source)
    settle(network, add_inverse(many))
    findings = []
    for mode in ("training", "evaluation"):
        findings += [f"{mode}: {finding}" for finding in audit(network.train(mode == "training"), six)]
    share, constant = unexplained_share(network, six)
    plain, labels = ConventionalNetwork(source), torch.arange(case.batch) % CLASSES
    forward, _ = cost(step.infer, plain, network, six, labels, rounds=rounds)
    training, plain_step = cost(step.train_step, plain, network, six, labels, rounds=rounds)
    parameters = sum(parameter.numel() for parameter in source.parameters())
    return Measured(case, parameters, difference, share, constant, findings, forward, training, plain_step)


def cost(
    function: Callable[..., None], plain: nn.Module, bcos: nn.Module, *arguments: Tensor, rounds: int
) -> tuple[float, float]:
    """Median ratio of the times of B-cos and plain, in turns, and the plain network's milliseconds."""
    turns = in_turns(
        {"plain": partial(function, plain, *arguments), "bcos": partial(function, bcos, *arguments)}, rounds
    )
    return ratio(turns, "bcos", "plain"), milliseconds(turns, "plain")


def unexplained_share(network: BcosNetwork, images: Tensor) -> tuple[float, bool]:
    """Unexplained share of the predicted logits, and True if the network has constants of no pixel.

    The share is Σ|logit - logit bias - Σ W(x)·(x - mean)| / Σ|logit - logit bias|. The network has constants
    if its logits minus the logit bias do not vanish for the mean image.
    """
    with torch.no_grad():
        targets = network(images).argmax(1)
        of_mean = network(network.mean[None, :, None, None].expand_as(images[:1])) - network.logit_bias
    logits, weights = dynamic_weights(network, images, targets)
    explained = (weights * (images - network.mean[:, None, None])).double().sum((1, 2, 3))
    actual = logits.gather(1, targets[:, None])[:, 0].double() - network.logit_bias
    share = float((actual - explained).abs().sum() / actual.abs().sum())
    return share, bool(of_mean.abs().max() > 1e-5 * actual.abs().mean())


COLUMNS = (
    "architecture", "family", "parameters (M)", "images", "convert: relative difference", "unexplained share",
    "audit findings", "forward ratio", "training-step ratio", "plain step (ms)",
)  # fmt: skip


def row(found: Measured) -> list[str]:
    """The cells of one table row, in the order of `COLUMNS`."""
    library, _, name = found.case.name.rpartition(":")
    own = found.case.name in ("resnet20", "simple_vit_ti", "vitc_ti")
    return [
        name + ("" if own else f" ({library or 'torchvision'})"),
        found.case.family,
        f"{found.parameters / 1e6:.1f}",
        f"{found.case.batch} × {found.case.size}²",
        f"{found.difference:.1e}",
        f"{found.share:.1e}" + (" (constants)" if found.constant else ""),
        str(len(found.findings)),
        f"{found.forward:.2f}",
        f"{found.step:.2f}",
        f"{found.plain_step:.0f}",
    ]


def document(results: list[Measured], command: str, threads: int) -> str:
    """The markdown page: its command, the meaning of the columns, the table and a summary."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "torchvision", "timm", "open_clip_torch")
    )
    shares = [found.share for found in results if not found.constant]
    ratios = [[found.forward for found in results], [found.step for found in results]]
    forward, step = (f"{statistics.median(each):.2f} (largest {max(each):.2f})" for each in ratios)
    return f"""# Architectures

Written by `{command}` ({versions}; {os.cpu_count()} CPU cores, {threads} threads, float32, eager).

All networks have random weights: the figures say how exact and how costly the conversion is, not how well a \
network classifies.
Parameters that start at a constant are random, too, because a layer scale of 1e-6 or a head of zeros would \
hide errors. Norms
have the statistics of a batch of random pictures. The weights of B-cos layers are scaled so that features \
do not vanish in deep
networks. Classifiers have {CLASSES} classes; the image towers of open_clip have embeddings.

- *convert: relative difference*: `convert` makes a B-cos network with B = 1 that computes the logits of the \
plain one. This is the
  largest difference of the logits, divided by the largest logit, in evaluation mode. The limit is \
{LIMIT:.0e}.
- *unexplained share*: Σ\\|logit − logit bias − Σ W(x)·(x − mean)\\| / Σ\\|logit − logit bias\\| after \
`bcosify`, which
  sets B = 2 and removes biases. The limit is {LIMIT:.0e}. Rows with (constants) have no limit: their class \
tokens or position
  embeddings add constants that no pixel carries.
- *audit findings*: number of functions that depend on the image non-linearly and are not held in \
explanation mode, in training
  and evaluation mode. It should be 0.
- *forward ratio*, *training-step ratio*: time of the B-cos network divided by that of the plain one, median \
of {ROUNDS} rounds in
  which both take turns. These networks and images are small, so that fixed costs weigh much; \
[benchmarks](benchmarks.md) has
  training at full size, compiled.

{table(COLUMNS, map(row, results))}

{len(results)} architectures. Largest relative difference: \
{max(found.difference for found in results):.1e}. Largest unexplained
share without constants: {max(shares, default=math.nan):.1e}. Audit findings: \
{sum(len(found.findings) for found in results)}. Median ratios:
forward {forward}, training step {step}.
"""


def main() -> None:
    """Measures the architectures of the command line, prints their rows and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the markdown page")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, failures = [], []
    print(*COLUMNS, sep=" | ")
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        start = time.perf_counter()
        try:
            found = measure(case)
        except Exception as error:  # one failure must not stop the other architectures
            failures.append(f"{case.name}: {error}")
            continue
        results.append(found)
        failures += [f"{case.name}: {failure}" for failure in found.failures()]
        print(*row(found), f"{time.perf_counter() - start:.0f} s", sep=" | ", flush=True)
    if options.write and results:
        command = " ".join(["python -m benchmarks.architectures", *sys.argv[1:]])
        options.write.write_text(document(results, command, options.threads))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
