"""Takes a reviewer's decision: records it, moves the aliases, copies it to the version's tags.

MLflow moves an alias by last write and tells nobody. So decisions on one model take turns, by Lamport's
bakery algorithm on their runs: a decision's run is created, gets a number above all numbers seen, and waits
for the unfinished decisions with lower numbers. When it is its turn, it takes effect only if the state is
still the one that the reviewer saw. On a SQLite file a lock makes the turns trivial.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipelines.errors import redacted
from pipelines.tracking.candidate import DECISION
from pipelines.tracking.decisions import (
    APPROVE,
    CANDIDATE,
    CHAMPION,
    DONE,
    MODEL,
    OUTCOME,
    PREVIOUS,
    REJECT,
    ROLLBACK,
    STAGE,
    Decision,
    State,
    aliases_of,
    gates_object,
    gates_of,
    look,
    objection,
    read,
    unfinished,
    versions_of,
)
from pipelines.tracking.journal import now
from pipelines.tracking.provenance import DIGEST
from pipelines.tracking.server import TrackingError, alone, connect, in_one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

PATIENCE = 60.0  # seconds after which an unfinished decision on a server counts as interrupted
POLL = 0.2  # seconds between two looks at the decisions before this one
LONGEST_REASON = 2000  # characters


@dataclass(frozen=True)
class Request:
    """A decision that a reviewer asks for.

    Attributes:
        action: approve, reject or rollback.
        name: name of the registered model.
        version: number of the version; empty for a rollback, which takes the holder of `previous`.
        reason: the reviewer's reason.
        override: reason to approve in spite of the gates; empty without one.
        withdraw: reject the version even if it is the champion, which leaves the model without one.
    """

    action: str
    name: str
    version: str
    reason: str
    override: str = ""
    withdraw: bool = False


class OvertakenError(TrackingError):
    """Another decision came first, or an alias was moved meanwhile. The decision has no effect."""


def decide(uri: str, request: Request, seen: State) -> tuple[Decision, bool]:
    """Makes a decision take effect; returns it, and False if it had taken effect before.

    If an earlier attempt of the same reviewer at the same decision was interrupted, it is completed.

    Args:
        uri: address of the tracking server or database.
        request: the decision.
        seen: the state that the reviewer decided on.

    Raises:
        OvertakenError: the state is no longer the one that the reviewer saw.
        TrackingError: the decision is refused, or the registry does not answer.
    """
    check_reasons(request)
    with in_one_line(uri):
        client = connect(uri)
        reviewer, verified = who(uri)
        with alone(uri, "register") as locked:  # the lock of `register`, which moves `candidate`
            run = _interrupted(client, request, reviewer)
            fresh = run is None or "number" not in run.data.params
            if fresh:
                if request.action == ROLLBACK:
                    request = replace(request, version=_previous(seen))
                version = client.get_model_version(request.name, request.version)
                if settled := _settled(seen, request, version):
                    return settled, False
                _check(request, version, seen)
                run = run or _begin(client, request, version, reviewer)
                _write_content(client, run, request, version, seen, verified)
            assert run is not None
            mine = read(client.get_run(run.info.run_id))
            _wait_for_turn(client, mine, 0 if locked else PATIENCE)
            if not _check_turn(client, mine, fresh):
                return mine, False
            _take_effect(client, mine)
            return read(client.get_run(mine.run_id)), True


def check_reasons(request: Request) -> None:
    """Raises `TrackingError` if the reason of a decision is empty, or one of the reasons too long."""
    if not request.reason.strip():
        raise TrackingError("--reason is empty: say why, for those who read the record later")
    for option, text in (("--reason", request.reason), ("--override", request.override)):
        if len(text) > LONGEST_REASON:
            raise TrackingError(f"{option} has {len(text)} characters, at most {LONGEST_REASON} are kept")


def who(uri: str) -> tuple[str, bool]:
    """Returns the reviewer's name, and whether the MLflow server at `uri` authenticated it.

    A server without a login does not know the user: the name is that of the system's user.
    """
    if uri.startswith("http"):
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        endpoint = "/api/2.0/mlflow/users/current"
        response = http_request(get_default_host_creds(uri), endpoint, "GET")
        if response.status_code != 404:
            return verify_rest_response(response, endpoint).json()["user"]["username"], True
    try:
        return getpass.getuser(), False
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}", False


def _interrupted(client: MlflowClient, request: Request, reviewer: str) -> Run | None:
    """Returns the unfinished run of the same decision by the same reviewer, `None` without one."""
    tags = _tags(request, reviewer).items()
    found = (run for run in unfinished(client, request.name) if run.data.tags.items() >= tags)
    return next(found, None)


def _previous(seen: State) -> str:
    if PREVIOUS not in seen.aliases:
        raise TrackingError(f"{seen.name} is not rolled back: no version has the alias {PREVIOUS}")
    return seen.aliases[PREVIOUS]


def _settled(seen: State, request: Request, version: ModelVersion) -> Decision | None:
    """Returns the effective decision that makes the request unnecessary, `None` if there is none."""
    last = seen.on(request.version)
    holds = {alias for alias, holder in seen.aliases.items() if holder == request.version}
    if request.action == APPROVE:
        done = CHAMPION in holds and not seen.moved_by_hand and objection(version, last) is None
    else:
        done = last is not None and last.rejected == request.version and not holds & {CHAMPION, PREVIOUS}
    return None if CANDIDATE in holds or request.action == ROLLBACK or not done else last


def _check(request: Request, version: ModelVersion, seen: State) -> None:
    """Raises `TrackingError` if the request must be refused."""
    place, gates = f"models:/{request.name}/{request.version}", gates_of(version)
    if request.action == APPROVE:
        if not version.tags.get(DIGEST):
            raise TrackingError(f"{place} has no tag {DIGEST}: `pipelines.tracking.register` sets it")
        if gates_object(gates) and not request.override.strip():
            raise TrackingError(
                f"{place} is not approved: its gates are {gates}; --override REASON overrides"
            )
    elif request.action == REJECT:
        if seen.aliases.get(CHAMPION) == request.version and not request.withdraw:
            raise TrackingError(
                f"{place} is the champion: `rollback` rejects it and gives the alias back to the previous "
                "champion; `reject --withdraw` leaves the model without a champion"
            )
    else:
        if seen.moved_by_hand:
            raise TrackingError(
                f"{request.name} is not rolled back: {seen.moved_by_hand[0]} was moved by hand. "
                "`approve` the version that should be the champion"
            )
        if why := objection(version, seen.on(request.version)):
            raise TrackingError(f"{request.name} is not rolled back to version {request.version}: {why}")


def _tags(request: Request, reviewer: str) -> dict[str, str]:
    """Returns the tags by which an interrupted decision is found again."""
    what = request.action if request.action == ROLLBACK else f"{request.action} {request.version}"
    return {"stage": STAGE, MODEL: request.name, "mlflow.source.name": what, "mlflow.user": reviewer}


def _begin(client: MlflowClient, request: Request, version: ModelVersion, reviewer: str) -> Run:
    """Creates the run of a decision, in the experiment of the version's run."""
    from mlflow.exceptions import MlflowException

    try:
        experiment = client.get_run(str(version.run_id)).info.experiment_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        place = f"models:/{request.name}/{request.version}"
        raise TrackingError(
            f"{place} has no run, or it was deleted for good: register the model again"
        ) from error
    name = f"{request.action} {request.name} {request.version}"
    return client.create_run(experiment, start_time=now(), tags=_tags(request, reviewer), run_name=name[:250])


def _write_content(
    client: MlflowClient,
    run: Run,
    request: Request,
    version: ModelVersion,
    seen: State,
    verified: bool,
) -> None:
    """Gives a decision its number and writes its content; MLflow writes all params at once."""
    from mlflow.entities import Param

    numbers = [item.number for item in look(client, request.name).decisions]
    before = {
        alias: seen.aliases[alias] for alias in (CANDIDATE, CHAMPION, PREVIOUS) if alias in seen.aliases
    }
    known = {str(item.version) for item in versions_of(client, request.name)}  # others were deleted
    wanted = _aliases_after(request, before, seen)
    after = {alias: holder for alias, holder in wanted.items() if holder in known}
    content = {
        "number": str(1 + max(numbers, default=0)),
        "follows": str(seen.last),
        "model": request.name,
        "version": request.version,
        "digest": version.tags.get(DIGEST, ""),
        "action": request.action,
        "reason": redacted(request.reason.strip()),
        "override": redacted(request.override.strip()),
        "reviewer": run.data.tags["mlflow.user"],
        "verified": str(verified).lower(),
        "gates": gates_of(version),
        "aliases.before": json.dumps(before),
        "aliases.after": json.dumps(after),
    }
    client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in content.items() if value])


def _aliases_after(request: Request, before: dict[str, str], seen: State) -> dict[str, str]:
    """Returns the aliases (alias -> version) after a decision."""
    number = request.version
    if request.action == REJECT:
        return {alias: holder for alias, holder in before.items() if holder != number}
    after = {alias: holder for alias, holder in before.items() if (alias, holder) != (CANDIDATE, number)}
    if request.action == APPROVE:
        # The champion by the record, because no decision stands behind one that was set by hand. Without a
        # champion, and if this one is approved again, the previous champion stays.
        champion = seen.decided.get(CHAMPION, before.get(CHAMPION))
        return after | {CHAMPION: number} | ({PREVIOUS: champion} if champion not in (None, number) else {})
    earlier = _champion_before(seen, number)
    others = {alias: holder for alias, holder in after.items() if alias != PREVIOUS}
    return others | {CHAMPION: number} | ({PREVIOUS: earlier} if earlier else {})


def _champion_before(seen: State, number: str) -> str | None:
    """Returns the champion that a version replaced when it was approved, unless that one was rejected."""
    approved = next(
        item for item in reversed(seen.effective) if (item.action, item.version) == (APPROVE, number)
    )
    earlier = approved.after.get(PREVIOUS)
    last = None if earlier is None else seen.on(earlier)
    return earlier if last is not None and last.rejected is None else None


def _wait_for_turn(client: MlflowClient, mine: Decision, patience: float) -> None:
    """Waits until no unfinished decision is before `mine`; gives up those that are there after `patience`.

    A run without a number is about to get one, so it counts as being before.
    """
    end, told = time.monotonic() + patience, False
    while ahead := [
        run.info.run_id
        for run in unfinished(client, mine.model)
        if (int(run.data.params.get("number", 0)), run.info.run_id) < (mine.number, mine.run_id)
    ]:
        if time.monotonic() >= end:
            for run_id in ahead:
                _end(client, run_id, "KILLED", f"interrupted, and replaced by decision {mine.number}")
        else:
            if not told:
                print(f"waiting for an unfinished decision on {mine.model}", file=sys.stderr)
                told = True
            time.sleep(POLL)


def _check_turn(client: MlflowClient, mine: Decision, fresh: bool) -> bool:
    """Returns False if another process of the reviewer has completed the decision `mine`, else True.

    Raises `OvertakenError` unless the state is the one that the reviewer saw.
    """
    state = look(client, mine.model)
    own = next(item for item in state.decisions if item.run_id == mine.run_id)
    place = f"models:/{mine.model}/{mine.version}"
    what = f"{place} is not {DONE[mine.action]}"
    if own.effective:
        return False
    if own.status != "RUNNING":
        raise OvertakenError(f"{what}: decision {mine.number} was {own.outcome or own.status}")
    moved = {alias for alias in (CHAMPION, PREVIOUS) if state.aliases.get(alias) != mine.before.get(alias)}
    if state.last != mine.follows:
        why = f"decision {state.last} came first: {state.effective[-1].told}"
    elif fresh and moved:
        why = f"the alias {min(moved)} was moved meanwhile"
    else:
        return True
    _end(client, mine.run_id, "FAILED", why)
    raise OvertakenError(f"{what}, {why}. Look again, then decide")


def _take_effect(client: MlflowClient, mine: Decision) -> None:
    """Moves the aliases, copies the decision to the version's tags and ends its run. Idempotent."""
    from mlflow.exceptions import MlflowException

    try:
        _move_aliases(client, mine)
        _set_tags(client, mine)
    except MlflowException as error:
        if error.error_code == "PERMISSION_DENIED":
            _end(client, mine.run_id, "FAILED", "the server refused to write the decision")
        raise
    if client.get_run(mine.run_id).info.status not in ("RUNNING", "FINISHED"):
        raise OvertakenError(f"decision {mine.number} was replaced while it was written: run `audit`")
    client.set_terminated(mine.run_id)
    aliases = aliases_of(client, mine.model)
    for alias in (CHAMPION, PREVIOUS):
        if aliases.get(alias) != mine.after.get(alias):
            raise OvertakenError(
                f"decision {mine.number} is recorded, but {alias} moved meanwhile: run `audit`"
            )


def _move_aliases(client: MlflowClient, mine: Decision) -> None:
    """Makes the aliases those of `mine.after`.

    `candidate` comes first: a server with a login demands the permission MANAGE for removing an alias, and
    EDIT for setting one, so a refusal comes before `champion` has moved. `candidate` is only ever taken away
    from the version, because `register` moves it too.
    """
    aliases = aliases_of(client, mine.model)
    if str(aliases.get(CANDIDATE)) == mine.version and CANDIDATE not in mine.after:
        client.delete_registered_model_alias(mine.model, CANDIDATE)
    for alias in (PREVIOUS, CHAMPION):
        holder = mine.after.get(alias)
        if holder == aliases.get(alias):
            continue
        if holder is None:
            client.delete_registered_model_alias(mine.model, alias)
        else:
            client.set_registered_model_alias(mine.model, alias, holder)


def _set_tags(client: MlflowClient, mine: Decision) -> None:
    """Copies the decision to the tags of the version that it approves or rejects.

    A rollback rejects the version that was champion. The version that it makes champion again keeps the tags
    of its approval.
    """
    number = mine.version if mine.action == APPROVE else mine.rejected
    if number is None:  # a rollback after the champion was withdrawn
        return
    done = DONE[APPROVE if mine.action == APPROVE else REJECT]
    copied = {"by": mine.by, "reason": mine.reason, "run": mine.run_id}
    for key, value in {
        DECISION: done,
        **{f"{DECISION}.{key}": value for key, value in copied.items()},
    }.items():
        client.set_model_version_tag(mine.model, number, key, value)


def _end(client: MlflowClient, run_id: str, status: str, outcome: str) -> None:
    """Ends the run of a decision that has no effect."""
    client.set_tag(run_id, OUTCOME, outcome)
    client.set_terminated(run_id, status)
