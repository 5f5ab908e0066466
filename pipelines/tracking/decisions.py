"""Recorded decisions of reviewers (approve, reject, roll back) and what follows from them.

Each decision is an MLflow run with the tag `stage` = `review`. Its content is in params, which MLflow never
changes once they are written. Its status says what became of it:

RUNNING    the decision was begun, and its aliases and tags are being written
FINISHED   it has taken effect
FAILED     it has no effect, because another decision came first or the server refused it
KILLED     it was interrupted, and a later decision replaced it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipelines.tracking.candidate import GATES
from pipelines.tracking.provenance import DIGEST
from pipelines.tracking.server import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"  # aliases
APPROVE, REJECT, ROLLBACK = "approve", "reject", "rollback"  # actions
DONE = {APPROVE: "approved", REJECT: "rejected", ROLLBACK: "rolled back"}
STAGE = "review"  # value of the tag `stage` of a decision's run
MODEL, OUTCOME = "review.model", "review.outcome"  # tags of a decision's run
NO_GATES = "none"


@dataclass(frozen=True)
class Decision:
    """One decision on a version of a registered model.

    Attributes:
        run_id: its MLflow run.
        status: status of that run.
        time: when it took effect, or began if it did not; milliseconds since 1970 (UTC).
        outcome: why it has no effect; empty if it has.
        number: its place among the decisions on this model, from 1.
        follows: number of the last effective decision that the reviewer saw, 0 if there was none.
        model: name of the registered model.
        version: the version that was approved or rejected, or that a rollback made champion again.
        digest: sha256 over the files of the version.
        action: approve, reject or rollback.
        reason: the reviewer's reason.
        override: reason for an approval in spite of the gates; empty without one.
        reviewer: name of the reviewer.
        verified: whether the MLflow server authenticated the reviewer.
        gates: gates of the version at that time: pass, fail, undecided or none.
        before: alias -> version before the decision.
        after: alias -> version after it.
    """

    run_id: str
    status: str
    time: int
    outcome: str
    number: int
    follows: int
    model: str
    version: str
    digest: str
    action: str
    reason: str
    override: str
    reviewer: str
    verified: bool
    gates: str
    before: Mapping[str, str]
    after: Mapping[str, str]

    @property
    def effective(self) -> bool:
        """True if the decision has taken effect."""
        return self.status == "FINISHED"

    @property
    def rejected(self) -> str | None:
        """Number of the version that the decision rejects; `None` if it rejects none."""
        return {REJECT: self.version, ROLLBACK: self.before.get(CHAMPION)}.get(self.action)

    @property
    def by(self) -> str:
        """Name of the reviewer, marked if no server authenticated it."""
        return self.reviewer if self.verified else f"{self.reviewer} (unverified)"

    @property
    def told(self) -> str:
        """The decision in a phrase: who decided what, when and why."""
        what = f"{DONE[self.action]} to" if self.action == ROLLBACK else DONE[self.action]
        return f"{self.by} {what} version {self.version} on {day(self.time)} ({self.reason})"


@dataclass(frozen=True)
class State:
    """The decisions on a registered model, ordered by number, and its aliases (alias -> version)."""

    name: str
    aliases: Mapping[str, str]
    decisions: Sequence[Decision]

    @property
    def effective(self) -> list[Decision]:
        """The decisions that have taken effect."""
        return [decision for decision in self.decisions if decision.effective]

    @property
    def last(self) -> int:
        """Number of the last effective decision, 0 if there is none."""
        return max((decision.number for decision in self.effective), default=0)

    @property
    def decided(self) -> dict[str, str]:
        """Holders of `champion` and `previous` that follow from the decisions (alias -> version)."""
        held: dict[str, str] = {}
        for decision in self.effective:
            after = held if decision.action == REJECT else decision.after
            held = {
                alias: after[alias]
                for alias in (CHAMPION, PREVIOUS)
                if alias in after and after[alias] != decision.rejected
            }
        return held

    @property
    def moved_by_hand(self) -> list[str]:
        """The aliases, of `champion` and `previous`, whose holders do not follow from the decisions."""
        decided = self.decided
        return [alias for alias in (CHAMPION, PREVIOUS) if self.aliases.get(alias) != decided.get(alias)]

    def on(self, version: str) -> Decision | None:
        """Returns the last effective decision that approved or rejected a version, `None` without one."""
        return next(
            (
                decision
                for decision in reversed(self.effective)
                if decision.rejected == version
                or (decision.action == APPROVE and decision.version == version)
            ),
            None,
        )


def look(client: MlflowClient, name: str) -> State:
    """Returns the aliases of a registered model and the decisions on it."""
    decisions = [read(run) for run in decision_runs(client, name) if "number" in run.data.params]
    return State(
        name, aliases_of(client, name), sorted(decisions, key=lambda item: (item.number, item.run_id))
    )


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """Returns the aliases of a registered model (alias -> version)."""
    return {alias: str(holder) for alias, holder in client.get_registered_model(name).aliases.items()}


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Returns the versions of a registered model, oldest first."""
    # MLflow's filters cannot escape a quote.
    filter_string = None if "'" in name else f"name = '{name}'"
    found = pages(client.search_model_versions, filter_string=filter_string)
    return sorted((item for item in found if item.name == name), key=lambda item: int(item.version))


def decision_runs(client: MlflowClient, name: str) -> list[Run]:
    """Returns the runs of all decisions on a registered model, also of those deleted in MLflow's UI.

    Only the experiments that have runs of the model's versions count. Any user of a server may create other
    experiments, and could write false decisions there.
    """
    from mlflow.entities import ViewType

    def runs(experiments: Iterable[str], filter_string: str) -> Iterator[Run]:
        arguments = {"filter_string": filter_string, "run_view_type": ViewType.ALL}
        return pages(client.search_runs, experiment_ids=list(experiments), **arguments)

    made_by = ", ".join(f"'{version.run_id}'" for version in versions_of(client, name) if version.run_id)
    if not made_by:
        return []
    readable = [item.experiment_id for item in pages(client.search_experiments, view_type=ViewType.ALL)]
    homes = {run.info.experiment_id for run in runs(readable, f"attributes.run_id IN ({made_by})")}
    # The filter leaves the name out, because it may have quotes, which MLflow's filters cannot escape.
    found = runs(homes, f"tags.stage = '{STAGE}'") if homes else ()
    return [run for run in found if run.data.tags.get(MODEL) == name]


def unfinished(client: MlflowClient, name: str) -> list[Run]:
    """Returns the runs of the decisions on a registered model that were begun and have not ended."""
    return [
        run
        for run in decision_runs(client, name)
        # MLflow refuses to end a deleted run.
        if run.info.status == "RUNNING" and run.info.lifecycle_stage == "active"
    ]


def read(run: Run) -> Decision:
    """Returns the decision that an MLflow run records."""
    params = run.data.params
    texts = ("model", "version", "action", "reason", "reviewer", "gates")
    return Decision(
        run_id=run.info.run_id,
        status=run.info.status,
        time=run.info.end_time or run.info.start_time,
        outcome=run.data.tags.get(OUTCOME, ""),
        number=int(params["number"]),
        follows=int(params["follows"]),
        digest=params.get("digest", ""),
        override=params.get("override", ""),
        verified=params["verified"] == "true",
        before=json.loads(params["aliases.before"]),
        after=json.loads(params["aliases.after"]),
        **{key: params[key] for key in texts},
    )


def gates_of(version: ModelVersion) -> str:
    """Returns the outcome of a version's gates: pass, fail, undecided or, if none are defined, none."""
    return version.tags.get(GATES, NO_GATES)


def gates_object(gates: str) -> bool:
    """Returns True if a version with this outcome of its gates must not be approved without an override."""
    return gates not in ("pass", NO_GATES)


def objection(version: ModelVersion, decision: Decision | None) -> str | None:
    """Returns why a version does not count as approved, `None` if it does.

    Args:
        version: the version, as the registry has it now.
        decision: the last decision on it, as `State.on` returns it.
    """
    gates = gates_of(version)
    if decision is None:
        return "no decision approved it"
    if decision.rejected is not None:
        return decision.told
    if version.tags.get(DIGEST) != decision.digest:
        return "its content is not what was approved"
    if gates_object(gates) and not decision.override:
        return f"its gates are {gates} now, and the approval did not override them"
    return None


def approval(client: MlflowClient, uri: str, name: str, version: str) -> Decision:
    """Returns the decision that approves a version.

    Args:
        client: client of the registry.
        uri: address of the version as the user gave it. If it names the alias `champion` or `previous`, the
            decisions must have given the alias to this version.
        name: name of the registered model.
        version: number of the version.

    Raises:
        TrackingError: the version does not count as approved.
    """
    state, place = look(client, name), f"models:/{name}/{version}"
    decision = state.on(version)
    why = objection(client.get_model_version(name, version), decision)
    alias = uri.removeprefix(f"models:/{name}").removeprefix("@")
    if why is None and alias in state.moved_by_hand:
        why = f"it holds the alias {alias}, but no decision gave it"
    if why is not None or decision is None:
        raise TrackingError(
            f"{place} is not approved: {why} (python -m pipelines.tracking.review show {place})"
        )
    return decision


def audit(client: MlflowClient, name: str) -> list[str]:
    """Returns what does not follow from the recorded decisions: aliases, champions, unfinished decisions."""
    state = look(client, name)
    found = []
    last = f"last decision {state.last}" if state.last else "no decision"
    for alias in (CHAMPION, PREVIOUS):
        holder = state.aliases.get(alias)
        if alias in state.moved_by_hand:
            decided = _version(state.decided.get(alias))
            found.append(
                f"{alias} is {_version(holder)}, by the record ({last}) {decided}: "
                "moved by hand, by whom is unknown"
            )
        elif holder is not None and (
            why := objection(client.get_model_version(name, holder), state.on(holder))
        ):
            found.append(f"{alias} is {_version(holder)}, which is not approved: {why}")
    for decision in state.decisions:
        if decision.status == "RUNNING":
            found.append(
                f"decision {decision.number} ({decision.action} version {decision.version}, {decision.by}) "
                "is unfinished: ask for it again"
            )
    return found


def _version(number: str | None) -> str:
    return "no version" if number is None else f"version {number}"


def pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """Yields the results of all pages of one of the MLflow client's searches."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def day(milliseconds: int) -> str:
    """Returns a time as date and minute, UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
