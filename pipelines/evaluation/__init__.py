"""Evaluation of trained models on the same images and grids: accuracy, localisation, completeness."""

from pipelines.evaluation.batches import examples_by_key
from pipelines.evaluation.comparison import evaluate, evaluate_splits
from pipelines.evaluation.explained_model import ExplainedModel, knows_positions, load_explained_model
from pipelines.evaluation.figures import BOX_SIZES, figures
from pipelines.evaluation.grids import grid_explainer
from pipelines.evaluation.predictions import Predictions
