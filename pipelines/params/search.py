"""Params of the search over params."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.params.base import Count, PositiveFloat, Sparse, Strict
from pipelines.params.renames import renamed

Scalar = bool | int | float | str | None


class SearchDimension(Sparse):
    """One dimension of a search space: a param, and a choice or a range of values."""

    key: str
    """Path of the param, such as bcosify.pretrained.optim.lr."""
    choice: Annotated[list[Scalar], Field(min_length=1)] | None = None
    """Values to choose from."""
    uniform: tuple[float, float] | None = None
    """Smallest and largest value of a uniform distribution."""
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """Smallest and largest value of a log-uniform distribution."""
    when: dict[str, Scalar] = {}
    """Key of an earlier dimension -> value at which this param is drawn. Otherwise the param keeps its
    value in params.yaml."""

    @property
    def extremes(self) -> list[Scalar]:
        """All values of a choice, or the least and the most of a range."""
        return list(self.choice or self.uniform or self.loguniform or ())

    @property
    def between(self) -> list[float]:
        """One value inside a range that is not an integer, as nearly all draws are. Empty for a choice."""
        bounds = self.uniform or self.loguniform
        return [bounds[0] + (bounds[1] - bounds[0]) / math.pi] if bounds else []

    @model_validator(mode="after")
    def _drawn_from_one(self) -> SearchDimension:
        if sum(given is not None for given in (self.choice, self.uniform, self.loguniform)) != 1:
            raise ValueError(f"{self.key}: exactly one of choice, uniform and loguniform is wanted")
        bounds = self.uniform or self.loguniform
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"{self.key}: the least ({bounds[0]:g}) must be below the most ({bounds[1]:g})")
        return self


class AshaParams(Strict):
    """Asynchronous successive halving (Li et al., MLSys 2020) by the first metric: weak trials end early."""

    grace: PositiveInt = 1
    """Epochs that every trial runs."""
    reduction: Annotated[float, Field(gt=1.0)] = 2.0
    """At each rung, the best 1/n of the trials continue, where n is this value."""


class SearchParams(Strict):
    """A search by Ray Tune and Optuna: short trials of one stage with other params."""

    stage: Literal[
        "bcosify@pretrained", "bcosify@scratch", "distill@kd", "distill@e2kd", "guide", "clip@cnn", "clip@vit"
    ]
    """Stage whose params are searched."""
    space: Annotated[list[SearchDimension], Field(min_length=1)]
    """Dimensions of the search. Each one has `choice`, `uniform` or `loguniform`."""
    metrics: Annotated[list[Annotated[str, Field(pattern="^val/")]], Field(min_length=1, max_length=3)]
    """Metrics of the Pareto front, one to three."""
    trials: PositiveInt
    """Number of trials. The first one has the params as they are, if they are in the space."""
    epochs: PositiveInt
    """Epochs per trial."""
    shots: PositiveInt | None = None
    """Training images per class; null: all."""
    asha: AshaParams | None = None
    """Early stopping of weak trials; null: all trials run to their end."""
    concurrency: PositiveInt
    """Trials that run at the same time."""
    workers: Count = 0
    """Ray workers per trial; 0: the trial runs in its own process."""
    seed: int = 0
    """Seed with which Optuna draws the trials."""

    @model_validator(mode="after")
    def _halved_in_their_own_process(self) -> SearchParams:
        # Ray Train's workers would hold their cores after the trial's end.
        if self.asha is not None and self.workers > 0:
            raise ValueError(
                "asha: trials that train on Ray workers run to their end: set asha to null, or workers to 0"
            )
        return self

    @model_validator(mode="after")
    def _students_have_their_own_shots(self) -> SearchParams:
        if self.shots is not None and self.stage.startswith("distill"):
            raise ValueError(f"shots: those of {self.stage} are distill.shots")
        return self

    @property
    def section(self) -> str:
        """Key of the params of the searched stage."""
        section = self.stage.replace("@", ".")
        return {"guide": "guide.guided", "clip.cnn": "clip.cnn.bcosify", "clip.vit": "clip.vit.bcosify"}.get(
            section, section
        )

    @property
    def epochs_key(self) -> str:
        """Key of the searched stage's epochs, which `epochs` replaces in trials."""
        return f"{self.section}.optim.epochs"

    @property
    def searchable(self) -> tuple[str, ...]:
        """Groups for keys of the space: the searched stage depends on them, and no earlier stage does."""
        if self.stage == "guide":
            return (self.section, "guide.data", "seed")
        if self.stage.startswith("clip"):
            return (self.section, "clip.data", "seed")
        return (
            self.section,
            *(("distill.student",) if self.stage.startswith("distill") else ()),
            "data",
            "seed",
        )

    @model_validator(mode="after")
    def _space_fits(self) -> SearchParams:
        seen: list[str] = []
        for dimension in self.space:
            key = dimension.key
            for name in (key, *dimension.when):
                if today := renamed(name):
                    raise ValueError(f"space: {name}: renamed to {today}")
            if not any(key == place or key.startswith(f"{place}.") for place in self.searchable):
                places = ", ".join(self.searchable)
                raise ValueError(
                    f"space: {key!r} does not change what {self.stage} computes; that is in {places}"
                )
            if key in seen:
                raise ValueError(f"space: {key!r} is there twice")
            if unknown := set(dimension.when) - set(seen):
                raise ValueError(
                    f"space: {key}: when names {sorted(unknown)[0]!r}, which is not drawn before it"
                )
            seen.append(key)
        if self.epochs_key in seen:
            raise ValueError(f"space: {self.epochs_key}: all trials have search.epochs")
        return self
