"""Attribution maps of B-cos and conventional models: which pixels speak for a class."""

from pipelines.attribution.explain import (
    METHODS,
    Explainer,
    attribute,
    attribute_many,
    explain,
    explain_one,
    explain_pairs,
    explainers,
    last_features,
)

__all__ = [
    "METHODS",
    "Explainer",
    "attribute",
    "attribute_many",
    "explain",
    "explain_one",
    "explain_pairs",
    "explainers",
    "last_features",
]
