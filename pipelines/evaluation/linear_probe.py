"""Linear probes: linear and B-cos heads on frozen features. N images, D features, K classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bcos import BcosLinear
from pipelines.bcos.precision import exact_float32
from pipelines.distributed import Context
from pipelines.evaluation.towers import embed_split, load_features
from pipelines.evaluation.zero_shot import check_labels
from pipelines.losses import uniform_off_label_bce
from pipelines.metrics import measured, multiclass_metrics
from pipelines.params import ClipEvaluateParams, DataParams
from pipelines.params.evaluation import LinearProbeParams


@exact_float32()
def evaluate_linear_probe(
    context: Context,
    directories: Mapping[str, str],
    shards: str,
    data: DataParams,
    params: ClipEvaluateParams,
    split: str = "test",
    train_split: str = "train",
) -> dict[str, Any]:
    """Accuracy on `split` of heads trained on features of `train_split`; the same on every worker.

    Features are divided by their norm. They are computed once, on the fixed view of evaluation, and used for
    all heads and losses. Every worker trains the same heads, which are small, so no gradients are exchanged.

    Args:
        context: rank and device of this worker.
        directories: name -> folder of an image tower, or of a classifier, whose own head is removed.
        shards: root of the labelled data.
        data: how shards are read.
        params: `params.probe` has the heads, the losses and how the heads are trained.
        split: the split that heads are evaluated on.
        train_split: the split that heads are trained on.

    Returns:
        `{"models": {name: {head: {loss: {"accuracy", "accuracy_top5", "calibration_error"}}}},
        "train_images": M, "images": N, "skipped": n}`.

    Raises:
        DataError: images without a label or with several, or no image.
        ModelError: a classifier without a linear head.
    """
    classes = len(check_labels(shards).classes)
    backbones = {name: load_features(directory, context.device)[0] for name, directory in directories.items()}
    where = (shards, data, params.batch_size)
    train, test = (embed_split(context, backbones, *where, each) for each in (train_split, split))
    labels, mine = train.labels.to(context.device), slice(context.rank, None, context.world_size)
    found: dict[str, Any] = {}
    for name in backbones:
        seen, unseen = (
            train.embeddings[name].to(context.device),
            test.embeddings[name][mine].to(context.device),
        )
        found[name] = {head: {} for head in params.probe.heads}
        for head, loss in product(params.probe.heads, params.probe.losses):
            trained = train_head(seen, labels, classes, head, loss, params.probe)
            metrics = multiclass_metrics(classes).to(context.device)
            metrics.update(trained(unseen), test.labels[mine].to(context.device))
            found[name][head][loss] = measured(metrics.compute())
    counts = {
        "train_images": len(train.labels),
        "images": len(test.labels),
        "skipped": train.skipped + test.skipped,
    }
    return {"models": found, **counts}


def train_head(
    features: Tensor, labels: Tensor, classes: int, head: str, loss: str, params: LinearProbeParams
) -> nn.Module:
    """Trains a head (N, D) -> logits (N, K) by AdamW with a cosine schedule. Deterministic.

    Args:
        features: (N, D).
        labels: (N,).
        classes: K.
        head: `linear` (with a bias) or `bcos` (without).
        loss: `cross_entropy`, or `bce` with off-targets of 1/K. With `bce`, a B-cos head has the logit bias
            -log(K - 1).
        params: epochs, batch size, learning rate, weight decay, seed.
    """
    generator = torch.Generator().manual_seed(params.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        module: nn.Module = nn.Linear(features.shape[1], classes)
        if head == "bcos":
            module = _BcosHead(
                features.shape[1], classes, params.b, -math.log(max(classes - 1, 1)) if loss == "bce" else 0.0
            )
    module.to(features.device)
    optimiser = torch.optim.AdamW(module.parameters(), lr=params.lr, weight_decay=params.weight_decay)
    steps = params.epochs * math.ceil(len(features) / params.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    objective = F.cross_entropy if loss == "cross_entropy" else uniform_off_label_bce
    for _ in range(params.epochs):
        for rows in (
            torch.randperm(len(features), generator=generator).to(features.device).split(params.batch_size)
        ):
            optimiser.zero_grad()
            objective(module(features[rows]), labels[rows]).backward()
            optimiser.step()
            schedule.step()
    return module.eval().requires_grad_(False)


class _BcosHead(BcosLinear):
    """A B-cos linear layer with a constant added to its outputs."""

    def __init__(self, features: int, classes: int, b: float, logit_bias: float) -> None:
        super().__init__(features, classes, b=b)
        self.logit_bias = logit_bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.logit_bias
