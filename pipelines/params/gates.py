"""Gates: what a model must fulfil to become the candidate for approval."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipelines.params.base import Sparse


class GateParams(Sparse):
    """One condition on a figure, in the words of `mlflow.models.MetricThreshold`. Exactly one of `threshold`,
    `min_absolute_change` and `min_relative_change` is set."""

    name: str
    """Name of the gate."""
    metric: Literal[
        "accuracy",
        "f1",
        "gridpg",
        "gridpg_own_grids",
        "epg",
        "on_object_epg",
        "iou",
        "unexplained_share",
    ]
    """The figure. Scores of explanations are those of a B-cos network's own explanation, and of GradCAM for a
    conventional network."""
    threshold: float | None = None
    """Value that the figure must reach."""
    min_absolute_change: float | None = None
    """Least difference from the figure of `against`; positive for an improvement."""
    min_relative_change: float | None = None
    """Least difference from the figure of `against`, as a share of it; positive for an improvement."""
    against: Literal["parent"] | None = None
    """The model that changes are measured from: the one that the network was made from."""
    greater_is_better: bool | None = None
    """Whether a greater value is better; null: as usual for the figure."""
    split: Literal["val", "test"] = "val"
    """Split that decides."""

    @model_validator(mode="after")
    def _one_condition(self) -> GateParams:
        bounds = (self.threshold, self.min_absolute_change, self.min_relative_change)
        if sum(bound is not None for bound in bounds) != 1:
            raise ValueError(
                f"gate {self.name}: set exactly one of threshold, min_absolute_change and min_relative_change"
            )
        if (self.threshold is None) != (self.against is not None):
            raise ValueError(
                f"gate {self.name}: a change needs `against: parent`, and a threshold has no `against`"
            )
        return self
