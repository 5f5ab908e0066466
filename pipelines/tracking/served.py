"""The served model, which `mlflow models serve` and `mlflow.pyfunc.load_model` run.

MLflow stores this file with each registered version (models from code); the weights beside it are
safetensors. Shapes: N images, H x W pixels, K classes, D dimensions of an embedding.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

import pipelines.models
from pipelines.bcos import add_inverse, contribution_map, dynamic_weights


class InputError(MlflowException):
    """Input that cannot be scored; the message is one short line.

    MLflow's server tries to put the whole input in front of the message. The setter of `message` ignores
    that.
    """

    def __init__(self, line: str) -> None:
        self._line = line
        super().__init__(line, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._line

    @message.setter
    def message(self, value: str) -> None: ...


class ServedModel(PythonModel):
    """Returns the logits of RGB images, and on request explanations. An image tower returns embeddings."""

    def load_context(self, context: Any) -> None:
        """Builds the network from the version's `model.json` and `model.safetensors`."""
        self.model, self.spec = pipelines.models.load(Path(context.artifacts["config"]).parent)
        # Explanation mode is a state of the model, and MLflow's server calls from several threads.
        self.one_at_a_time = threading.Lock()

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Scores images.

        Args:
            context: MLflow's context, not used.
            model_input: (N, 3, H, W) float32, RGB in [0, 1].
            params: `explain` (bool): return contribution maps too. `targets` (list of N class indices): the
                classes to explain, by default the class of each image's highest logit.

        Returns:
            `logits` (N, K), or `embeddings` (N, D) of an image tower. With `explain` also `targets` (N,) and
            `contributions` (N, H, W), the amount that each pixel adds to the target's logit.

        Raises:
            InputError: the images have another shape or range, or a target is not a class. With `explain`
                also: the model is conventional or an image tower, which have no contribution maps.
        """
        images = add_inverse(_check_images(model_input))
        with self.one_at_a_time:
            return self._scored(images, params or {})

    def _scored(self, images: torch.Tensor, params: dict[str, Any]) -> dict[str, np.ndarray]:
        if not params.get("explain"):
            with torch.no_grad():
                return {
                    "embeddings" if self.spec.task == "embedding" else "logits": self.model(images).numpy()
                }
        if self.spec.task == "embedding":
            raise InputError("explain: an image tower has no classes; a zero-shot classifier made of it has")
        if self.spec.kind != "bcos":
            raise InputError(
                f"explain: a {self.spec.kind} model has no contribution maps of its own, a bcos model has"
            )
        targets = self._targets(params.get("targets") or [], images)
        logits, weights = dynamic_weights(self.model, images, targets)
        maps = contribution_map(images, weights)
        return {"logits": logits.numpy(), "targets": targets.numpy(), "contributions": maps.detach().numpy()}

    def _targets(self, targets: list[int], images: torch.Tensor) -> torch.Tensor:
        """Returns the given targets (N,) after a check, or without any the top classes."""
        if len(targets) == 0:
            with torch.no_grad():
                return self.model(images).argmax(1)
        classes = len(self.spec.classes)
        if len(targets) != len(images):
            raise InputError(
                f"targets: one class index an image is wanted; {len(targets)} for {len(images)} images"
            )
        if not all(0 <= target < classes for target in targets):
            raise InputError(f"targets: class indices are 0 to {classes - 1}")
        return torch.tensor(targets)


def _check_images(images: np.ndarray) -> torch.Tensor:
    """Returns `images` as a float32 tensor; raises `InputError` unless they are (N, 3, H, W) in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(f"images must be (N, 3, H, W), not {tuple(images.shape)}")
    tensor = torch.from_numpy(np.array(images, dtype=np.float32))
    if not (tensor.min() >= 0 and tensor.max() <= 1):  # also true if there is a NaN
        raise InputError(f"images must be in [0, 1], not {tensor.min():.4g} to {tensor.max():.4g}")
    return tensor


mlflow.models.set_model(ServedModel())
