"""Evaluation of trained models beside each other: accuracy, localisation, completeness, on the same images and the same grids."""

from pipelines.evaluation.batches import examples_by_key
from pipelines.evaluation.comparison import evaluate, evaluate_and_judge
from pipelines.evaluation.explained_model import OWN, Subject, knows_positions, load_subject
from pipelines.evaluation.grids import grid_explainer
from pipelines.evaluation.predictions import Predictions
from pipelines.evaluation.scores import BOX_SIZES, Scores

__all__ = [
    "BOX_SIZES",
    "OWN",
    "Predictions",
    "Scores",
    "Subject",
    "evaluate",
    "evaluate_and_judge",
    "examples_by_key",
    "grid_explainer",
    "knows_positions",
    "load_subject",
]
