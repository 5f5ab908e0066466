"""Params of the search over params."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from pipelines.params.base import PositiveFloat, Strict

Scalar = bool | int | float | str | None


class SearchDimension(Strict):
    """One dimension of a search space: a param by its path, and what it is drawn from."""

    key: str  # such as bcosify.pretrained.lr
    choice: Annotated[list[Scalar], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None  # least, most
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    when: dict[
        str, Scalar
    ] = {}  # keys before this one -> value: drawn where they have these, otherwise left as it is

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}

    @property
    def extremes(self) -> list[Scalar]:
        """Every value of a choice, the least and the most of a range."""
        return list(self.choice or self.uniform or self.loguniform or ())

    @property
    def between(self) -> list[float]:
        """For a range, one value that is no whole number, as nearly all that will be drawn; none for a choice."""
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

    grace: PositiveInt = 1  # epochs that every trial gets
    reduction: Annotated[float, Field(gt=1.0)] = 2.0  # one in so many trials that come to a rung goes on


class SearchParams(Strict):
    """A search by Ray Tune and Optuna: the work of a stage, many times over, with some params replaced."""

    stage: Literal[
        "bcosify@pretrained", "bcosify@scratch", "distill@kd", "distill@e2kd", "guide", "clip@cnn", "clip@vit"
    ]
    space: Annotated[list[SearchDimension], Field(min_length=1)]
    metrics: Annotated[list[Annotated[str, Field(pattern="^val/")]], Field(min_length=1, max_length=3)]
    trials: PositiveInt
    epochs: PositiveInt  # of a trial
    shots: PositiveInt | None = None  # training images a class that trials learn from; none: all
    asha: AshaParams | None = None  # none: every trial runs to its end
    concurrency: PositiveInt  # trials at once
    workers: Annotated[int, Field(ge=0)] = 0  # of a trial; 0: in the trial's own process
    seed: int = 0

    @model_validator(mode="after")
    def _halved_in_their_own_process(self) -> SearchParams:
        if (
            self.asha is not None and self.workers > 0
        ):  # Ray Train's workers would hold their cores after the trial's end
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
        """The key of the searched stage's own params."""
        section = self.stage.replace("@", ".")
        return {"guide": "guide.guided", "clip.cnn": "clip.cnn.bcosify", "clip.vit": "clip.vit.bcosify"}.get(
            section, section
        )

    @property
    def searchable(self) -> tuple[str, ...]:
        """Where the keys of the space may be: in what the searched stage depends on, but not the stages before it."""
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
        if f"{self.section}.epochs" in seen:
            raise ValueError(f"space: {self.section}.epochs: all trials have search.epochs")
        return self
