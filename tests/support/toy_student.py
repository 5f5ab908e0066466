"""e²KD between tiny networks, on the tiny data of `toy`."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.attribution import comparable_explainers
from pipelines.bcos import bcosify
from pipelines.methods import E2KD
from pipelines.models import ModelSpec
from pipelines.params import DistillationParams
from pipelines.storage import files
from pipelines.training import Context, Job
from pipelines.training.loop import fit
from tests.support.method_params import method_params
from tests.support.toy import CLASSES, SIDE


def toy_student() -> E2KD:
    """Returns e²KD between two small B-cos networks.

    They have no batch norms, so the loss of a batch is the mean of the losses of its parts.
    """

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        return bcosify(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)))

    student, teacher, probe = network(3), network(4), torch.full((1, 6, SIDE, SIDE), 0.5)
    spec = ModelSpec("toy", tuple("abc"), SIDE, "bcos")
    params = method_params(DistillationParams, epochs=3, lr=0.02, explanation_weight=2.0)
    return E2KD(student, spec, teacher, params, comparable_explainers(student, teacher, probe, held=True))


def distil_together(context: Context, jobs: dict[str, Job]) -> dict[str, tuple[float, float]]:
    """Trains each job and returns its explanation loss in the first and in the last epoch."""
    for job in jobs.values():
        fit(context, job)
    histories = {name: files.read_json(f"{job.directory}/history.json") for name, job in jobs.items()}
    return {
        name: tuple(row[k]["metrics"]["train/explanation"] for k in (0, -1))
        for name, row in histories.items()
    }
