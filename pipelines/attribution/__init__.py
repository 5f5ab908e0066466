"""Attribution maps of B-cos and conventional models: which pixels speak for a class."""

from pipelines.attribution.explain import (
    METHODS,
    Attribution,
    Explainer,
    attribute,
    comparable_explainers,
    explain,
    explain_pairs,
)
from pipelines.attribution.gradcam import last_features
from pipelines.bcos import dynamic_weights

__all__ = [
    "METHODS",
    "Attribution",
    "Explainer",
    "attribute",
    "comparable_explainers",
    "dynamic_weights",
    "explain",
    "explain_pairs",
    "last_features",
]
