"""Attribution maps of B-cos and conventional models: how much each pixel contributes to a class."""

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
