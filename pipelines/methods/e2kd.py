"""e²KD: a student learns the teacher's answers and its explanations.

Shapes: N images of H x W pixels, K classes. Maps (N, ...) are dynamic weights (N, 6, H, W) or GradCAM's
maps (N, H, W).

Source: Parchami-Araghi et al., Good Teachers Explain: Explanation-Enhanced Knowledge Distillation, ECCV 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from pipelines import models
from pipelines.attribution import Explainer, comparable_explainers
from pipelines.bcos import add_inverse, check_held
from pipelines.data.loading.batch import Batch
from pipelines.losses import (
    binary_distillation_loss,
    distillation_loss,
    explanation_loss,
    uniform_off_label_bce,
)
from pipelines.methods.method import Classification
from pipelines.metrics import Agreement
from pipelines.models import ModelError, ModelSpec

if TYPE_CHECKING:
    from pipelines.params import DistillationParams, ModelParams


class E2KD(Classification):
    """τ²·KL(teacher ‖ student) + λ·mean(1 - cos(E_T, E_S)) + α·L_gt (eq. 1 to 4).

    E_T and E_S are the teacher's and the student's explanation of the class that the teacher predicts. On
    data with several labels per image, KL is summed over the K classes as independent binary decisions. L_gt
    is the loss that a student of this kind would be trained with alone. For B-cos networks this is binary
    cross-entropy with off-label targets 1/K; for conventional ones it is cross-entropy, binary on data with
    several labels. If α = 0, labels only serve to evaluate the accuracy.

    Args:
        module: the student. It is explained in its current mode (training or evaluation).
        spec: the student's spec.
        teacher: a model of the same classes. It is put into evaluation mode, never trained, and not part of
            the module's state.
        params: τ, λ, α, and the steps on which explanations are matched.
        explain: explainers of the student and of the teacher, see `comparable_explainers`; `None` if λ = 0.
        labelled: False if batches have no labels; α must then be 0, and agreement is the only metric.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        teacher: nn.Module,
        params: DistillationParams,
        explain: tuple[Explainer, Explainer] | None,
        labelled: bool = True,
    ) -> None:
        super().__init__(module, spec.task, len(spec.classes), params.mixup)
        self.kind, self.params, self.labelled = spec.kind, params, labelled
        self.teacher = teacher.eval().requires_grad_(False)
        self.fixed = (self.teacher,)
        weighted = {"explanation": params.explanation_weight, "label": params.label_weight}
        self.losses = ("loss", "distillation", *(name for name, weight in weighted.items() if weight > 0))
        self.explain_student: Explainer | None = explain[0] if explain else None
        self.explain_teacher: Explainer | None = explain[1] if explain else None

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Returns `image` (N, 6, H, W), `teacher_logits` (N, K), and if needed `teacher_maps` and `target`.

        `teacher_maps` (N, ...) is needed on steps that match explanations, `target` if α > 0 or images are
        mixed.
        """
        with_labels = self.params.label_weight > 0 or self.params.mixup > 0
        made = super().prepare(batch) if with_labels else {"image": add_inverse(batch["image"])}
        matched = self.explain_teacher is not None and batch.get("step", 0) % self.params.explain_every == 0
        # The teacher, too, takes the batch in parts, so that its memory is bounded.
        parts = made["image"].tensor_split(batch.get("parts", 1))
        if self.params.explanations == "frozen":
            logits = batch["teacher_logits"]
            made |= {"teacher_maps": batch["teacher_maps"]} if matched else {}
        elif self.explain_teacher is not None and matched:
            explained = [self.explain_teacher(self.teacher, part) for part in parts]
            logits, maps = (torch.cat(each) for each in zip(*explained, strict=True))
            made["teacher_maps"] = _single(maps)
        else:
            logits = torch.cat([self._taught(part) for part in parts])
        return {**made, "teacher_logits": _single(logits)}

    def targets(self, batch: Batch) -> Tensor:
        """Returns the labels; if the data has none, zeros (N,), which mixup needs but no loss uses."""
        return (
            super().targets(batch)
            if self.labelled
            else batch["image"].new_zeros(len(batch["image"]), dtype=torch.long)
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `loss` and its unweighted terms.

        The terms are `distillation`, `explanation` on steps that match explanations, and `label` if α > 0.
        """
        params, images, teacher_logits = self.params, batch["image"], batch["teacher_logits"]
        losses: dict[str, Tensor] = {}
        if "teacher_maps" in batch:
            assert self.explain_student is not None
            logits, maps = self.explain_student(model, images, teacher_logits.argmax(1), create_graph=True)
            losses["explanation"] = explanation_loss(
                maps.to(batch["teacher_maps"].dtype), batch["teacher_maps"]
            ).mean()
        else:
            logits = model(images)
        divergence = distillation_loss if self.task == "multiclass" else binary_distillation_loss
        losses["distillation"] = divergence(
            logits.to(teacher_logits.dtype), teacher_logits, params.temperature
        )
        if params.label_weight > 0:
            losses["label"] = self._label_loss(logits, batch["target"])
        weights = {
            "distillation": 1.0,
            "explanation": params.explanation_weight,
            "label": params.label_weight,
        }
        return {"loss": sum(weights[name] * value for name, value in losses.items()), **losses}  # type: ignore[dict-item]

    def metrics(self) -> Any:
        """Returns the metrics of the task, if there are labels, and `agreement` with the teacher."""
        of_task = super().metrics() if self.labelled else {}
        metrics: dict[str, Metric | MetricCollection] = {name: of_task[name] for name in of_task}
        return MetricCollection(metrics | {"agreement": Agreement()}, compute_groups=False)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        images = add_inverse(batch["image"])
        given = {"target": self.targets(batch).long()} if self.labelled else {}
        metrics.update(preds=model(images), teacher=self._taught(images), **given)

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """Returns the teacher's logits (N, K)."""
        return self.teacher(images)

    def _label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.kind == "bcos":
            return uniform_off_label_bce(logits, targets)
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets)


def _single(values: Tensor) -> Tensor:
    """Detaches `values` and converts half precision to float32, because sums over a map's pixels follow."""
    return values.detach().float() if values.dtype.itemsize < 4 else values.detach()


def check_pair(student: ModelSpec, teacher: ModelSpec, explained: bool) -> None:
    """Raises `ModelError`, with a message of one line, if the student cannot learn from the teacher.

    Args:
        student: the student's spec; its classes, task and image size are those of the data.
        teacher: the teacher's spec.
        explained: True if the student learns the teacher's explanations too.
    """
    if teacher.classes != student.classes:
        raise ModelError(f"teacher: it knows {_few(teacher.classes)}; the data has {_few(student.classes)}")
    if teacher.task != student.task:
        raise ModelError(
            f"teacher: it was trained for the task {teacher.task}; the data has the task {student.task}"
        )
    if teacher.image_size != student.image_size:
        raise ModelError(
            f"teacher: it was trained at {teacher.image_size} px; "
            f"image_size must be the same, not {student.image_size}"
        )
    if explained and student.kind == "bcos" and teacher.kind == "conventional":
        raise ModelError(
            "teacher: a conventional teacher has no dynamic weights that a B-cos student could learn: "
            "take a B-cos teacher (its B-cosified version), a student of the kind conventional "
            "(both are then explained by GradCAM), or plain distillation (explanation_weight: 0)"
        )


def _few(classes: tuple[str, ...], most: int = 4) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:most])}{', ...' if len(classes) > most else ''})"


def build_e2kd(
    model: ModelParams,
    spec: ModelSpec,
    teacher: str | Path,
    params: DistillationParams,
    seed: int,
    labelled: bool = True,
) -> E2KD:
    """Builds the method on the student that `spec` describes.

    Args:
        model: the student's network, and its pretrained weights if it has any.
        spec: the student's spec.
        teacher: folder of the teacher, as `models.save` writes it.
        params: weights and options of the loss.
        seed: seed of random weights.
        labelled: False if the data has no labels.

    Raises:
        ModelError: student and teacher do not fit, see `check_pair`.
        ConversionError: a part of a B-cos student cannot be converted, or explanation mode cannot hold its
            factors.
    """
    loaded, teacher_spec = models.load(teacher)
    explained = params.explanation_weight > 0
    check_pair(spec, teacher_spec, explained)
    torch.manual_seed(seed)
    network = models.build(
        model.name, model.weights, num_classes=len(spec.classes), sha256=model.sha256, options=model.options
    )
    module = models.assemble(spec, network)
    probe = torch.full((2, 6, spec.image_size, spec.image_size), 0.5)
    if spec.kind == "bcos":
        check_held(module, probe)
    held = spec.kind == teacher_spec.kind == "bcos"
    explain = comparable_explainers(module, loaded, probe, held=held) if explained else None
    return E2KD(module, spec, loaded, params, explain, labelled)
