"""`python -m pipelines.tracking.review COMMAND`: the reviewer's desk for registered models.

A version is given as NAME/VERSION or NAME@ALIAS; `models:/` before it is fine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.errors import UserError
from pipelines.tracking import desk
from pipelines.tracking.deciding import Request, decide
from pipelines.tracking.decisions import CHAMPION, PREVIOUS, ROLLBACK, Decision, audit, day, look
from pipelines.tracking.server import connect, in_one_line, tracking_uri, where_to_look

if TYPE_CHECKING:
    from mlflow import MlflowClient

COLOURS = {"pass": "green", "approved": "green", "fail": "red", "rejected": "red", "undecided": "yellow"}
EXAMPLES = {
    "list": "list bcos-objects",
    "show": "show bcos-objects@candidate",
    "diff": "diff bcos-objects@champion bcos-objects@candidate",
    "approve": 'approve bcos-objects/4 --reason "EPG up, no class below 90 %"',
    "reject": 'reject bcos-objects/4 --reason "looks at the background of class dog"',
    "rollback": 'rollback bcos-objects --reason "wrong on night images"',
    "log": "log bcos-objects --json",
    "audit": "audit bcos-objects",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 if it is done and 1 if it is refused. Wrong usage exits with 2."""
    options = parser().parse_args(arguments)
    try:
        uri = tracking_uri()
        with in_one_line(uri):
            status: int = options.run(connect(uri), options)
            return status
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m pipelines.tracking.review",
        description=__doc__,
        epilog=f"exit codes: 0 done, 1 refused, 2 wrong usage\n\nexample:\n  {_example('list')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example:\n  {_example(name)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run, action=name)
        return command

    def add_version(command: argparse.ArgumentParser, name: str) -> None:
        command.add_argument(name, type=_reference, metavar=name.upper(), help="NAME/VERSION or NAME@ALIAS")

    def add_reason(command: argparse.ArgumentParser) -> None:
        command.add_argument("--reason", required=True, help="why; kept in the record")

    listing = add("list", run_list, "list the versions of a registered model, or of all")
    listing.add_argument("name", nargs="?", metavar="NAME", help="name of a registered model")
    add_version(add("show", run_show, "show gates, figures, tags and decisions of a version"), "version")
    comparing = add("diff", run_diff, "show in which figures, params and tags two versions differ")
    add_version(comparing, "a")
    add_version(comparing, "b")
    approving = add("approve", run_decide, "make a version the champion")
    add_version(approving, "version")
    add_reason(approving)
    approving.add_argument("--override", default="", metavar="REASON", help="why in spite of the gates")
    rejecting = add("reject", run_decide, "reject a version; it loses its alias candidate or previous")
    add_version(rejecting, "version")
    add_reason(rejecting)
    rejecting.add_argument(
        "--withdraw", action="store_true", help="reject even the champion; the model then has none"
    )
    back = add(
        "rollback", run_decide, "make the previous champion the champion again and reject the present one"
    )
    back.add_argument("name", metavar="NAME", help="name of a registered model")
    add_reason(back)
    for name, run, what in (
        ("log", run_log, "list the decisions: which version was champion when, by whom, why"),
        ("audit", run_audit, "name aliases that no decision explains (exit code 1 if there are any)"),
    ):
        add(name, run, what).add_argument("name", metavar="NAME", help="name of a registered model")
    return top


def _example(name: str) -> str:
    return f"python -m pipelines.tracking.review {EXAMPLES[name]}"


def _reference(text: str) -> desk.Reference:
    try:
        return desk.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_list(client: MlflowClient, options: argparse.Namespace) -> int:
    """Prints a row per version."""
    name = None if options.name is None else desk.find_name(client, options.name)
    rows = desk.overview(client, name)
    table = _table("version", "registered", "aliases", "gates", "decision", "by")
    for row in rows:
        place, aliases = f"{row['name']}/{row['version']}", ", ".join(row["aliases"])
        table.add_row(
            place,
            day(row["created"]),
            aliases,
            _coloured(row["gates"]),
            _coloured(row["decision"]),
            _cell(row["by"]),
        )
    return _print(options, rows, table)


def run_show(client: MlflowClient, options: argparse.Namespace) -> int:
    """Prints gates, figures, tags and decisions of a version."""
    version = desk.find_version(client, options.version)
    found = desk.evidence(client, version)
    head = Table.grid(padding=(0, 2))
    aliases = ", ".join(found["aliases"]) or "none"
    facts = {"aliases": aliases, "gates": found["gates"], "decision": found["decision"] or "none"}
    for key, value in {"version": f"{found['name']}/{found['version']}", **facts, **found["tags"]}.items():
        head.add_row(key, _coloured(value))
    gates = _table("gate", "figure", "split", "outcome", "compared", "interval", "condition")
    for gate in found["gate_results"]:
        outcome = _coloured(gate.get("outcome"))
        first, last = ([_cell(gate.get(key)) for key in keys] for keys in (_GATE_IS, _GATE_FOUND))
        gates.add_row(*first, outcome, *last, _condition(gate))
    values = _table("figure", "value")
    for key, value in found["figures"].items():
        values.add_row(key, _cell(value))
    parts = [head, gates, values, _decisions_table(found["decisions"])]
    shown = {**found, "decisions": [asdict(item) for item in found["decisions"]]}
    _print(options, shown, *(part for part in parts if part is head or part.row_count))
    if not options.json:
        run = client.get_run(str(version.run_id)).info if version.run_id else None
        place = (None, None) if run is None else (run.experiment_id, run.run_id)
        Console(highlight=False).print(where_to_look(tracking_uri(), *place), soft_wrap=True)
    return 0


_GATE_IS, _GATE_FOUND = ("name", "metric", "split"), ("compared", "interval")


def _condition(gate: Mapping[str, Any]) -> str:
    """Returns what a gate demands: a bound, or a least change from the figure of another model."""
    if gate.get("threshold") is not None:
        return f"{'≥' if gate.get('greater_is_better', True) else '≤'} {_cell(gate['threshold'])}"
    change = gate.get("min_absolute_change")
    share = gate.get("min_relative_change")
    told = f"{change:+g}" if change is not None else f"{share:+.0%}" if share is not None else ""
    return f"{gate.get('against', '')} {told}".strip()


def run_diff(client: MlflowClient, options: argparse.Namespace) -> int:
    """Prints in which figures, params and tags two versions differ."""
    found = desk.differences(client, *(desk.find_version(client, each) for each in (options.a, options.b)))
    first, second = found["versions"]
    figures = _table("figure", first, second, "difference")
    for key, (one, other) in found["figures"].items():
        difference = "" if None in (one, other) else f"{other - one:+.4g}"
        figures.add_row(key, _cell(one), _cell(other), difference)
    others = _table("param or tag", first, second)
    for key, (one, other) in {**found["params"], **found["tags"]}.items():
        others.add_row(key, _cell(one), _cell(other))
    return _print(options, found, figures, others)


def run_decide(client: MlflowClient, options: argparse.Namespace) -> int:
    """Approves or rejects a version, or rolls a model back."""
    if options.action == ROLLBACK:
        request = Request(ROLLBACK, desk.find_name(client, options.name), "", options.reason)
    else:
        version = desk.find_version(client, options.version)
        extra = {key: value for key, value in vars(options).items() if key in ("override", "withdraw")}
        request = Request(options.action, version.name, str(version.version), options.reason, **extra)
    decision, new = decide(tracking_uri(), request, look(client, request.name))
    told = f"{decision.model}: decision {decision.number}, {decision.told}"
    holders = [f"{alias}: {decision.after.get(alias, 'none')}" for alias in (CHAMPION, PREVIOUS)]
    return _print(options, asdict(decision), f"{told}{'' if new else ', as before'}", ", ".join(holders))


def run_log(client: MlflowClient, options: argparse.Namespace) -> int:
    """Prints all decisions on a registered model, oldest first."""
    decisions = look(client, desk.find_name(client, options.name)).decisions
    return _print(options, [asdict(item) for item in decisions], _decisions_table(decisions))


def run_audit(client: MlflowClient, options: argparse.Namespace) -> int:
    """Prints what no decision explains; returns 1 if there is anything."""
    name = desk.find_name(client, options.name)
    found = audit(client, name)
    _print(
        options, found, *(f"{name}: {line}" for line in found or ["the aliases follow from the decisions"])
    )
    return 1 if found else 0


def _decisions_table(decisions: Iterable[Decision]) -> Table:
    """Returns the table of decisions, with the champion after each."""
    table = _table("", "when", "decision", "champion", "by", "reason")
    for decision in decisions:
        effect = decision.after.get(CHAMPION, "none") if decision.effective else "unchanged"
        reasons = [decision.reason, *([f"override: {decision.override}"] if decision.override else [])]
        without = [f"no effect: {decision.outcome or decision.status}"] if not decision.effective else []
        table.add_row(
            str(decision.number),
            day(decision.time),
            f"{decision.action} {decision.version}",
            effect,
            _cell(decision.by),
            _cell("; ".join([*reasons, *without])),
        )
    return table


def _table(*heads: str) -> Table:
    table = Table(*heads, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    return table


def _coloured(value: str | None) -> Text:
    return Text(_cell(value), style=COLOURS.get(str(value), ""))


def _cell(value: Any) -> str:
    """Returns a value as the text of a table's cell, without control characters."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def _print(options: argparse.Namespace, content: Any, *parts: Table | str) -> int:
    """Prints `content` as JSON if the user asks for it, else `parts`; returns 0."""
    if options.json:
        print(json.dumps(content, indent=2))
        return 0
    # Names and reasons are not rich's markup.
    console = Console(highlight=False, markup=False, emoji=False)
    for number, part in enumerate(parts):
        if number and isinstance(part, Table):
            console.print()
        console.print(_cell(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
