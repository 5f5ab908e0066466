"""e²KD: a student that learns the teacher's answers and its explanations.

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
    """τ²·KL(teacher ‖ student) + λ·mean(1 - cos(E_T, E_S)) + α·L_gt, E explaining what the teacher predicts (eq. 1 to 4).

    For images with several labels, the KL divergence is summed over classes as independent decisions. L_gt is the loss that each
    kind of model is trained with alone: binary cross-entropy with off-label targets 1/K for B-cos networks, cross-entropy for
    conventional ones. Labels are not needed where α = 0, but for the accuracy in evaluation.

    Args:
        module: the student; explained in the mode that it is in.
        spec: of the student.
        teacher: of the same classes; it is put into evaluation mode, never trained, and no part of the module's state.
        params: τ, λ, α, and on which steps explanations are matched.
        explain: how student and teacher are explained, see `comparable_explainers`; `None` where λ = 0.
        labelled: whether batches have labels; without, α is 0 and agreement is the only metric.
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
        """`image`; `teacher_logits` (N, K); on a step with explanations `teacher_maps` (N, ...); where labels count `target`."""
        with_labels = self.params.label_weight > 0 or self.params.mixup > 0
        made = super().prepare(batch) if with_labels else {"image": add_inverse(batch["image"])}
        matched = self.explain_teacher is not None and batch.get("step", 0) % self.params.explain_every == 0
        parts = made["image"].tensor_split(
            batch.get("parts", 1)
        )  # which bound the memory of the teacher, too
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
        """Those of the data; where it has none, zeros that are mixed along with the images and count for nothing."""
        return (
            super().targets(batch)
            if self.labelled
            else batch["image"].new_zeros(len(batch["image"]), dtype=torch.long)
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, and what it is made of, unweighted: `distillation`, on a step with explanations `explanation`, and `label`."""
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
        """Those of the task, and `agreement` with the teacher."""
        of_task = super().metrics() if self.labelled else {}
        metrics: dict[str, Metric | MetricCollection] = {name: of_task[name] for name in of_task}
        return MetricCollection(metrics | {"agreement": Agreement()}, compute_groups=False)

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Takes an evaluation batch into `metrics`."""
        images = add_inverse(batch["image"])
        given = {"target": self.targets(batch).long()} if self.labelled else {}
        metrics.update(preds=model(images), teacher=self._taught(images), **given)

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """The teacher's logits."""
        return self.teacher(images)

    def _label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.kind == "bcos":
            return uniform_off_label_bce(logits, targets)
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets)


def _single(values: Tensor) -> Tensor:
    """Without graph, and where they are of half precision in single one: sums over a map's pixels follow."""
    return values.detach().float() if values.dtype.itemsize < 4 else values.detach()


def check_pair(student: ModelSpec, teacher: ModelSpec, explained: bool) -> None:
    """Raises `ModelError`, one line, if a student of this spec cannot learn from a teacher of that one.

    Args:
        student: its classes and image size are those of the data.
        teacher: of the model that teaches.
        explained: whether the student learns the teacher's explanations too.
    """
    if teacher.classes != student.classes:
        raise ModelError(f"teacher: it knows {_few(teacher.classes)}; the data has {_few(student.classes)}")
    if teacher.task != student.task:
        raise ModelError(
            f"teacher: it was trained for the task {teacher.task}; the data has the task {student.task}"
        )
    if teacher.image_size != student.image_size:
        raise ModelError(
            f"teacher: it was trained at {teacher.image_size} px; image_size must be the same, not {student.image_size}"
        )
    if explained and student.kind == "bcos" and teacher.kind == "conventional":
        raise ModelError(
            "teacher: a conventional teacher has no dynamic weights that a B-cos student could learn: take a B-cos teacher (its "
            "B-cosified version), a student of the kind conventional (both are then explained by GradCAM), or plain distillation "
            "(explanation_weight: 0)"
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
    """The method on the student of `spec`, from the weights that `model` names or of weights drawn by `seed`.

    Args:
        model: the student's network and weights.
        spec: of the student.
        teacher: folder of the teacher, as `models.save` writes it.
        params: of the loss.
        seed: of random weights.
        labelled: whether the data has labels.

    Raises:
        ModelError: student and teacher do not fit.
        ConversionError: a B-cos student has a part that explanation mode would not hold.
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
