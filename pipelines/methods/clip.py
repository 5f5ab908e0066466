"""CLIP: an image tower and a text tower trained on captions, and the B-cosification of an image tower on images alone.

Sources: Arya et al., B-cosification, NeurIPS 2024, section 5; Radford et al., Learning Transferable Visual Models, ICML 2021;
Zhai et al., LiT: Zero-Shot Transfer with Locked-image Text Tuning, CVPR 2022; Zhai et al., Sigmoid Loss, ICCV 2023.
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

LARGEST_SCALE = math.log(100)  # of cosines, as CLIP's authors bound it
SCALES = {
    "clip": (math.log(1 / 0.07), None),
    "siglip": (math.log(10), -10.0),
}  # where logit scale and bias start


class MeanLoss(MeanScore):
    """The mean of a loss over images."""

    higher_is_better = False


class MeanCosine(MeanScore):
    """The mean cosine of embeddings over images."""

    higher_is_better = True


class ClipBcosification(FineTuning):
    """A B-cosified image tower that learns the embeddings of the original one; texts are not needed.

    The loss is SigLIP's, with fixed scale and bias, the mean of 1 - cosine, or InfoNCE. SigLIP's negatives are the teacher's
    embeddings of the whole step on all workers (`negatives: batch`), which carry no gradient: so workers exchange embeddings,
    never gradients of them, and a step is the same on any number of workers.

    Args:
        module: the student, (N, 6, H, W) -> (N, D).
        teacher: likewise; it is put into evaluation mode, never trained, and no part of the module's state.
        params: the loss, and how B and the biases are treated.
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
        """`image` (N, 6, H, W) in [0, 1], and `target` (N, D), the teacher's embeddings, float32, of norm 1."""
        images = add_inverse(batch["image"])
        parts = images.tensor_split(batch.get("parts", 1))  # which bound the memory of the teacher, too
        return {"image": images, "target": torch.cat([self._taught(part) for part in parts])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a prepared batch."""
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
        """`loss`, with negatives from each validation batch, and `cosine`, of the student's embedding and the teacher's."""
        return MetricCollection({"loss": MeanLoss(), "cosine": MeanCosine()}, compute_groups=False)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Takes an evaluation batch into `metrics`."""
        images = add_inverse(batch["image"])
        features, targets = widened(model(images)), self._taught(images)
        metrics["loss"].update(self._local_loss(features, targets).expand(len(images)))
        metrics["cosine"].update(F.cosine_similarity(features, targets, dim=1))

    def _local_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """The loss of these images alone."""
        params = self.params
        if params.loss == "siglip":
            return siglip_loss(features, targets, params.scale, params.pair_bias)
        if params.loss == "cosine":
            return cosine_embedding_loss(features, targets)
        return info_nce_loss(features, targets, params.temperature_nce)

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """The teacher's embeddings."""
        return F.normalize(self.teacher(images).detach().float(), dim=1)


def build_clip(spec: ModelSpec, teacher: str | Path, params: ClipParams, seed: int) -> ClipBcosification:
    """The method on the B-cos tower of `spec`, which starts from the weights of the teacher in the folder `teacher`.

    A tower of another name or other options than the teacher's starts from weights drawn by `seed`.

    Raises:
        ModelError: the teacher gives embeddings of another width.
        ConversionError: the tower has a part that cannot be converted, or that explanation mode would not hold.
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
    """The shape of what `tower` gives for an image of `size` pixels: (D,) if it is an image tower."""
    training = tower.training
    found = tower.eval()(torch.full((2, 6, size, size), 0.5)).shape[1:]
    tower.train(training)
    return tuple(found)


class ImageText(nn.Module):
    """An image tower and a text tower, and how their cosines become logits: scale·cos + bias.

    Args:
        image: (N, 6, H, W) in [0, 1] -> (N, D).
        text: tokens (T, L) -> (T, D), and `tokens` of texts.
        loss: `clip`, without a bias, or `siglip`.
        locked: the image tower is frozen and stays in evaluation mode.

    Attributes:
        logit_scale: the logarithm of the scale.
    """

    def __init__(self, image: nn.Module, text: models.TextTower, loss: str, locked: bool) -> None:
        super().__init__()
        self.image, self.text, self.locked = image, text, locked
        scale, bias = SCALES[loss]
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.tensor(bias)))
        if locked:
            image.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 6, H, W) in [0, 1] -> embeddings (N, D)."""
        return self.image(images)

    def train(self, mode: bool = True) -> ImageText:
        """Sets the mode of all but a locked image tower."""
        super().train(mode)
        if self.locked:
            self.image.eval()
        return self


class ImageTextTraining:
    """Training of a CLIP by open_clip's own losses: an image and its caption are near, all other pairs far.

    Pairs are made of the images that are taken at once (`training.accumulate`), on all workers. open_clip's losses take equally
    many of them from each worker, see `check_equal_shares`.

    Args:
        module: both towers.
        params: the loss; `locked`.
    """

    fields: tuple[str, ...] = ("caption",)
    shared: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("loss",)

    def __init__(self, module: ImageText, params: ImageTextParams) -> None:
        self.module: nn.Module = module
        self.towers, self.params = module, params
        self.fixed: tuple[nn.Module, ...] = (module.image,) if params.locked else ()
        together = dist.is_available() and dist.is_initialized()
        rank, workers = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self._loss, self._local_loss = open_clip_loss(params.loss, rank, workers), open_clip_loss(params.loss)

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, 6, H, W) in [0, 1], or the embeddings (N, D) of a locked tower as `features`; `tokens` (N, L)."""
        images = add_inverse(batch["image"])
        if self.towers.locked:
            parts = images.tensor_split(batch.get("parts", 1))
            return {
                "features": torch.cat([self._embedded(part) for part in parts]),
                "tokens": self._tokens(batch),
            }
        return {"image": images, "tokens": self._tokens(batch)}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a prepared batch."""
        images = batch["features"] if "features" in batch else model.image(batch["image"])
        texts = model.text(batch["tokens"])
        return {"loss": self._loss(*self._compared(model, images, texts))}

    def metrics(self) -> Any:
        """`loss`, with the pairs of each validation batch, and the figures of `Recall`, of each image's first caption."""
        kinds: dict[str, Metric | MetricCollection] = {
            "loss": MeanLoss(),
            "recall": Recall(self.towers.text.width),
        }
        return MetricCollection(kinds, compute_groups=False)

    def update(self, metrics: Any, model: Any, batch: Batch) -> None:
        """Takes an evaluation batch into `metrics`."""
        images, texts = model.image(add_inverse(batch["image"])), model.text(self._tokens(batch))
        loss = self._local_loss(*self._compared(model, images, texts))
        metrics["loss"].update(loss.expand(len(images)))
        metrics["recall"].update(images, texts)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay on weights of two and more dimensions, none on biases, norms, logit scale and logit bias."""
        return weight_groups(self.module, weight_decay)

    def set_progress(self, epochs: float) -> None:
        """Bounds the scale of cosines to 100: the last step may have taken it above."""
        with torch.no_grad():
            self.towers.logit_scale.clamp_(0, LARGEST_SCALE)

    def epoch_metrics(self) -> dict[str, float]:
        """`logit_scale`, by which cosines are multiplied."""
        return {"logit_scale": float(self.towers.logit_scale.detach().exp())}

    @torch.no_grad()
    def _embedded(self, images: Tensor) -> Tensor:
        """The embeddings of a locked image tower, float32."""
        return widened(self.towers.image(images)).detach()

    def _tokens(self, batch: Batch) -> Tensor:
        """The tokens of each image's caption; raises `ModelError`, which names the image, where there is none."""
        captions = batch.get("caption", [""] * len(batch["key"]))
        for key, caption in zip(batch["key"], captions, strict=True):
            if not caption.strip():
                raise ModelError(
                    f"image {key} has no caption: two towers are trained on images with captions"
                )
        return self.towers.text.tokens(captions).to(batch["image"].device)

    @staticmethod
    def _compared(model: Any, images: Tensor, texts: Tensor) -> tuple[Any, ...]:
        """What open_clip's losses take: embeddings of norm 1, the scale, the bias."""
        images, texts = F.normalize(widened(images), dim=1), F.normalize(widened(texts), dim=1)
        return images, texts, model.logit_scale.exp(), model.logit_bias


def open_clip_loss(name: str, rank: int = 0, workers: int = 1) -> nn.Module:
    """open_clip's loss over the pairs of all workers: averaged over them, its gradient is that of one worker with all pairs."""
    from open_clip.loss import ClipLoss, SigLipLoss

    if name == "siglip":
        return SigLipLoss(rank=rank, world_size=workers)
    return ClipLoss(local_loss=workers > 1, gather_with_grad=workers > 1, rank=rank, world_size=workers)


def check_equal_shares(batch_size: int, training: TrainingParams, data: DataParams) -> None:
    """Raises `ParamsError` if workers may have different numbers of images in a step, which open_clip's losses do not take."""
    if training.most_workers == 1:
        return
    for workers in range(training.least_workers, training.most_workers + 1):
        if batch_size % workers:
            equal = batch_size // workers * workers or workers
            raise ParamsError(
                f"batch_size: open_clip's loss takes as many images from each of {workers} workers: {equal}, not {batch_size}"
            )
    if data.on_error == "skip":
        raise ParamsError(
            "data.on_error: skip leaves images out, and open_clip's loss takes as many from each worker: raise, or one worker"
        )


def build_image_text(
    model: ModelParams, spec: ModelSpec, text: NetworkParams, params: ImageTextParams, seed: int
) -> ImageTextTraining:
    """The method on the image tower of `model` and the text tower of `text`; what has no weights is drawn by `seed`.

    Raises:
        ModelError: the towers give embeddings of different widths.
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
    return ImageTextTraining(ImageText(image, text_tower, params.loss, params.locked), params)
