"""The served model: what MLflow runs behind `mlflow models serve` and `mlflow.pyfunc.load_model`.

This file travels with each registered version, as models-from-code; the weights beside it are safetensors.
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
    """Input that cannot be scored, in one short line. MLflow's server would put the whole input before it; the line stays."""

    def __init__(self, line: str) -> None:
        self._line = line
        super().__init__(line, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """The line."""
        return self._line

    @message.setter
    def message(self, value: str) -> None: ...


class ServedModel(PythonModel):
    """RGB images in, logits and on request explanations out; of an image tower embeddings."""

    def load_context(self, context: Any) -> None:
        """Builds the network from the version's `model.json` and `model.safetensors`."""
        self.model, self.spec = pipelines.models.load(Path(context.artifacts["config"]).parent)
        self.one_at_a_time = (
            threading.Lock()
        )  # explanation mode is a state of the model; MLflow's server calls from threads

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Scores images.

        Args:
            context: MLflow's, not used.
            model_input: (N, 3, H, W) float32, RGB in [0, 1].
            params: `explain` (bool): give contribution maps too. `targets` (list of N class indices): what to explain, by
                default each image's highest logit.

        Returns:
            `logits` (N, K), of an image tower `embeddings` (N, D); where explained also `targets` (N,) and `contributions`
            (N, H, W): what each pixel adds to the target's logit.

        Raises:
            InputError: images of another shape or range, a target that is no class, a model that does not explain itself, an
                image tower that is to be explained.
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
        """(N,) the given targets, checked, or the top classes."""
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
    """(N, 3, H, W) float32 in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(f"images must be (N, 3, H, W), not {tuple(images.shape)}")
    tensor = torch.from_numpy(np.array(images, dtype=np.float32))
    if not (tensor.min() >= 0 and tensor.max() <= 1):  # also where there is a NaN
        raise InputError(f"images must be in [0, 1], not {tensor.min():.4g} to {tensor.max():.4g}")
    return tensor


mlflow.models.set_model(ServedModel())
