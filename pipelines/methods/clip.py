"""CLIP: trains an image and a text tower on captions, and B-cosifies an image tower on images alone.

Shapes: N images of H x W pixels, T texts of L tokens, D dimensions of an embedding.

Sources: Arya et al., B-cosification, NeurIPS 2024 (CLIP); Radford et al., Learning Transferable Visual
Models, ICML 2021; Zhai et al., LiT: Zero-Shot Transfer with Locked-image Text Tuning, CVPR 2022; Zhai et al.,
Sigmoid Loss, ICCV 2023.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from pipelines import models
from pipelines.bcos import add_inverse, check_held
from pipelines.bcos.precision import widened
from pipelines.data.loading.batch import Batch
from pipelines.losses import cosine_embedding_loss, info_nce_loss, siglip_loss
from pipelines.methods.bcosification import FineTuning
from pipelines.methods.method import weight_groups
from pipelines.metrics import MeanScore, Recall
from pipelines.models import ModelError, ModelSpec
from pipelines.params import ParamsError

if TYPE_CHECKING:
    from pipelines.params import (
        ClipParams,
        DataParams,
        ImageTextParams,
        ModelParams,
        NetworkParams,
        TrainingParams,
    )

LARGEST_SCALE = math.log(100)  # logarithm of the largest factor of cosines, the bound of Radford et al.
# Loss -> initial logit scale (its logarithm) and initial logit bias.
SCALES = {
    "clip": (math.log(1 / 0.07), None),
    "siglip": (math.log(10), -10.0),
}


class MeanLoss(MeanScore):
    """The mean of a loss over images."""

    higher_is_better = False


class MeanCosine(MeanScore):
    """The mean cosine of embeddings over images."""

    higher_is_better = True


class ClipBcosification(FineTuning):
    """Trains a B-cosified image tower to reproduce the embeddings of the original tower, without any text.

    The loss is SigLIP's with fixed scale and bias, the mean of 1 - cosine, or InfoNCE. With SigLIP and
    `negatives: batch`, the negatives are the teacher's embeddings of all images of the step, on all workers.
    These embeddings carry no gradient, so workers exchange embeddings but not their gradients. The step is
    then the same on any number of workers.

    Args:
        module: the student, (N, 6, H, W) in [0, 1] -> (N, D).
        teacher: the original tower, of the same shapes. It is put into evaluation mode, never trained, and
            not part of the module's state.
        params: the loss, and for `FineTuning` the treatment of B and the biases.
    """

    params: ClipParams
    fixed: tuple[nn.Module, ...]
    fields: tuple[str, ...] = ()
    shared: tuple[str, ...]
    losses: tuple[str, ...] = ("loss",)

    def __init__(self, module: nn.Module, teacher: nn.Module, params: ClipParams) -> None:
        self.module, self.params = module, params
        self.teacher = teacher.eval().requires_grad_(False)
        self.fixed = (self.teacher,)
        self.shared = ("target",) if params.loss == "siglip" and params.negatives == "batch" else ()

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `image` (N, 6, H, W) in [0, 1] and `target` (N, D), the teacher's embeddings of norm 1."""
        images = add_inverse(batch["image"])
        # The teacher, too, takes the batch in parts, so that its memory is bounded.
        parts = images.tensor_split(batch.get("parts", 1))
        return {"image": images, "target": torch.cat([self._taught(part) for part in parts])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = widened(model(batch["image"]))
        if "all_target" in batch:
            params = self.params
            return {
                "loss": siglip_loss(
                    features, batch["all_target"], params.scale, params.pair_bias, positives=batch["row"]
                )
            }
        return {"loss": self._local_loss(features, batch["target"])}

    def metrics(self) -> Any:
        """Returns `loss`, with negatives from the same validation batch, and `cosine` to the teacher."""
        return MetricCollection({"loss": MeanLoss(), "cosine": MeanCosine()}, compute_groups=False)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        images = add_inverse(batch["image"])
        features, targets = widened(model(images)), self._taught(images)
        metrics["loss"].update(self._local_loss(features, targets).expand(len(images)))
        metrics["cosine"].update(F.cosine_similarity(features, targets, dim=1))

    def _local_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss whose negatives are the other images of this batch."""
        params = self.params
        if params.loss == "siglip":
            return siglip_loss(features, targets, params.scale, params.pair_bias)
        if params.loss == "cosine":
            return cosine_embedding_loss(features, targets)
        return info_nce_loss(features, targets, params.temperature_nce)

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """Returns the teacher's embeddings (N, D), float32, of norm 1."""
        return F.normalize(self.teacher(images).detach().float(), dim=1)


def build_clip(spec: ModelSpec, teacher: str | Path, params: ClipParams, seed: int) -> ClipBcosification:
    """Builds the method on the B-cos image tower of `spec`.

    The teacher is the image tower in the folder `teacher`. The student starts from the teacher's weights if
    both have the same architecture and options. Otherwise it starts from random weights drawn with `seed`.

    Raises:
        ModelError: the embeddings of student and teacher differ in shape.
        ConversionError: a part of the tower cannot be converted, or explanation mode cannot hold its factors.
    """
    loaded, taught = models.load(teacher)
    torch.manual_seed(seed)
    same = (spec.name, spec.options) == (taught.name, taught.options)
    module = models.assemble(spec, loaded.get_submodule("network") if same else None)
    own, wanted = (embedding_shape(tower, spec.image_size) for tower in (module, loaded))
    if own != wanted:
        raise ModelError(f"teacher: its embeddings have the shape {wanted}, those of the student {own}")
    check_held(module, torch.full((2, 6, spec.image_size, spec.image_size), 0.5))
    return ClipBcosification(module, loaded, params)


@torch.no_grad()
def embedding_shape(tower: nn.Module, size: int) -> tuple[int, ...]:
    """Returns the shape of the output of `tower` for one image of `size` x `size` pixels, usually (D,)."""
    training = tower.training
    found = tower.eval()(torch.full((2, 6, size, size), 0.5)).shape[1:]
    tower.train(training)
    return tuple(found)


class ImageText(nn.Module):
    """An image tower and a text tower, with the scale and bias of their logits, scale·cos + bias.

    Args:
        image: the image tower, (N, 6, H, W) in [0, 1] -> (N, D).
        text: the text tower, tokens (T, L) -> (T, D). Its method `tokens` tokenises texts.
        loss: `clip`, whose logits have no bias, or `siglip`.
        locked: True if the image tower is frozen and stays in evaluation mode.
        classes: K classes of the labels that a linear classifier on the embeddings learns; 0 for none.

    Attributes:
        logit_scale: the logarithm of the scale.
        logit_bias: the bias, or `None`.
        classifier: the linear classifier (N, D) -> (N, K), or `None`. It is not part of the saved model.
    """

    def __init__(
        self, image: nn.Module, text: models.TextTower, loss: str, locked: bool, classes: int = 0
    ) -> None:
        super().__init__()
        self.image, self.text, self.locked = image, text, locked
        self.classifier = nn.Linear(text.width, classes) if classes else None
        scale, bias = SCALES[loss]
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.tensor(bias)))
        if locked:
            image.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the embeddings (N, D) of images (N, 6, H, W) in [0, 1]."""
        return self.image(images)

    def train(self, mode: bool = True) -> ImageText:
        super().train(mode)
        if self.locked:
            self.image.eval()
        return self


class ImageTextTraining:
    """Trains a CLIP by open_clip's losses, which pull images towards their own captions only.

    If `label_weight` > 0, a linear classifier on the image embeddings learns the labels at the same time.
    Few captioned images teach an image tower little; their labels teach it what the captions name.

    The loss compares all pairs of an image and a caption in one part of the batch (see
    `training.accumulate`), over all workers. open_clip's losses need the same number of images from each
    worker, see `check_equal_shares`.

    Args:
        module: both towers.
        params: `loss`, `locked` and `label_weight` are used.
        task: task of the labels, `multiclass` or `multilabel`.
    """

    fields: tuple[str, ...] = ("caption",)
    shared: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("loss",)

    def __init__(self, module: ImageText, params: ImageTextParams, task: str = "multiclass") -> None:
        self.module: nn.Module = module
        self.towers, self.params = module, params
        self.label_field = "label" if task == "multiclass" else "labels"
        self.losses = ("loss", *(("pairs", "label") if module.classifier is not None else ()))
        self.fixed: tuple[nn.Module, ...] = (module.image,) if params.locked else ()
        together = dist.is_available() and dist.is_initialized()
        rank, workers = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self._loss, self._local_loss = open_clip_loss(params.loss, rank, workers), open_clip_loss(params.loss)

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `tokens` (N, L) and `image` (N, 6, H, W) in [0, 1].

        If the image tower is locked, its embeddings `features` (N, D) take the place of `image`. If labels
        are learned, `target` is class indices (N,), or (N, K) of {0, 1}.
        """
        images = add_inverse(batch["image"])
        if self.towers.locked:
            parts = images.tensor_split(batch.get("parts", 1))
            return {
                "features": torch.cat([self._embedded(part) for part in parts]),
                "tokens": self._tokens(batch),
            }
        labels = {"target": batch[self.label_field]} if self.towers.classifier is not None else {}
        return {"image": images, "tokens": self._tokens(batch), **labels}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `loss`; if labels are learned also its unweighted terms, `pairs` and `label`."""
        images = batch["features"] if "features" in batch else model.image(batch["image"])
        texts = model.text(batch["tokens"])
        pairs = self._loss(*self._compared(model, images, texts))
        if model.classifier is None:
            return {"loss": pairs}
        logits, target = model.classifier(images), batch["target"]
        of_labels = F.cross_entropy if target.ndim == 1 else F.binary_cross_entropy_with_logits
        label = of_labels(logits, target)
        return {"loss": pairs + self.params.label_weight * label, "pairs": pairs, "label": label}

    def metrics(self) -> Any:
        """Returns `loss` over the pairs of a validation batch, and `Recall` of the first captions."""
        kinds: dict[str, Metric | MetricCollection] = {
            "loss": MeanLoss(),
            "recall": Recall(self.towers.text.width),
        }
        return MetricCollection(kinds, compute_groups=False)

    def update(self, metrics: Any, model: Any, batch: Batch) -> None:
        images, texts = model.image(add_inverse(batch["image"])), model.text(self._tokens(batch))
        loss = self._local_loss(*self._compared(model, images, texts))
        metrics["loss"].update(loss.expand(len(images)))
        metrics["recall"].update(images, texts)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return weight_groups(self.module, weight_decay)

    def set_progress(self, epochs: float) -> None:
        """Clamps the scale of the logits to [1, 100], a range that the last step may have left."""
        with torch.no_grad():
            self.towers.logit_scale.clamp_(0, LARGEST_SCALE)

    def epoch_metrics(self) -> dict[str, float]:
        """Returns `logit_scale`, the scale itself and not its logarithm."""
        return {"logit_scale": float(self.towers.logit_scale.detach().exp())}

    @torch.no_grad()
    def _embedded(self, images: Tensor) -> Tensor:
        """Returns the image tower's embeddings (N, D) of `images` in float32, without a graph."""
        return widened(self.towers.image(images)).detach()

    def _tokens(self, batch: Batch) -> Tensor:
        """Returns the captions' tokens (N, L); raises `ModelError` naming an image without a caption."""
        captions = batch.get("caption", [""] * len(batch["key"]))
        for key, caption in zip(batch["key"], captions, strict=True):
            if not caption.strip():
                raise ModelError(
                    f"image {key} has no caption: two towers are trained on images with captions"
                )
        return self.towers.text.tokens(captions).to(batch["image"].device)

    @staticmethod
    def _compared(model: Any, images: Tensor, texts: Tensor) -> tuple[Any, ...]:
        """Returns the arguments of open_clip's losses: embeddings of norm 1, the scale and the bias."""
        images, texts = F.normalize(widened(images), dim=1), F.normalize(widened(texts), dim=1)
        return images, texts, model.logit_scale.exp(), model.logit_bias


def open_clip_loss(name: str, rank: int = 0, workers: int = 1) -> nn.Module:
    """Returns open_clip's loss `name` over the pairs of all workers.

    The mean of the workers' gradients is the gradient that a single worker with all pairs would compute.
    """
    from open_clip.loss import ClipLoss, SigLipLoss

    if name == "siglip":
        return SigLipLoss(rank=rank, world_size=workers)
    return ClipLoss(local_loss=workers > 1, gather_with_grad=workers > 1, rank=rank, world_size=workers)


def check_equal_shares(batch_size: int, training: TrainingParams, data: DataParams) -> None:
    """Raises `ParamsError` if workers may get different numbers of images in a step.

    open_clip's losses need the same number from each worker.
    """
    if training.most_workers == 1:
        return
    for workers in range(training.least_workers, training.most_workers + 1):
        if batch_size % workers:
            equal = batch_size // workers * workers or workers
            raise ParamsError(
                f"batch_size: open_clip's loss takes as many images from each of {workers} workers: "
                f"{equal}, not {batch_size}"
            )
    if data.on_error == "skip":
        raise ParamsError(
            "data.on_error: skip leaves images out, and open_clip's loss takes as many from each worker: "
            "raise, or one worker"
        )


def build_image_text(
    model: ModelParams,
    spec: ModelSpec,
    text: NetworkParams,
    params: ImageTextParams,
    seed: int,
    classes: int = 0,
    task: str = "multiclass",
) -> ImageTextTraining:
    """Builds the method on the image tower of `model` and the text tower of `text`.

    `classes` and `task` are those of the images' labels, for `label_weight` > 0. A tower without pretrained
    weights gets random weights drawn with `seed`.

    Raises:
        ModelError: the embeddings of the two towers differ in width.
    """
    torch.manual_seed(seed)
    network = models.build(model.name, model.weights, sha256=model.sha256, options=model.options)
    image = models.assemble(spec, network)
    text_tower = models.build_text_tower(text.name, text.weights, text.sha256, text.options)
    found = embedding_shape(image, spec.image_size)
    if found != (text_tower.width,):
        raise ModelError(
            f"the image tower gives embeddings of the shape {found}, the text tower of ({text_tower.width},)"
        )
    labels = classes if params.label_weight > 0 else 0
    return ImageTextTraining(ImageText(image, text_tower, params.loss, params.locked, labels), params, task)
