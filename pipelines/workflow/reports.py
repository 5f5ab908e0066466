"""The reports of a stage: JSON and CSV for DVC's metrics and plots, tables for the console."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pipelines.directions import with_arrows
from pipelines.errors import redacted
from pipelines.storage.files import write, write_json
from pipelines.workflow.places import REPORTS

if TYPE_CHECKING:
    from pipelines.training import Result


def flat(nested: Mapping[str, Any]) -> dict[str, float]:
    """Flattens nested figures to `a/b/c` -> value."""
    found: dict[str, float] = {}
    for key, value in nested.items():
        inner = flat(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{key}/{rest}".rstrip("/"): number for rest, number in inner.items()}
    return found


def report_training(name: str, result: Result, objectives: Sequence[str]) -> None:
    """Writes `metrics.json` (best epoch) and `history.json` (all epochs, for plots) to `reports/<name>`.

    With several objectives, `front.json` lists the epochs on their Pareto front with their checkpoints, and
    marks the one that was chosen.
    """
    best, folder = result.best, REPORTS / name
    write_json(folder / "metrics.json", {"epoch": best["epoch"], **best["metrics"]})
    write_json(folder / "history.json", [{"epoch": row["epoch"], **row["metrics"]} for row in result.history])
    if len(objectives) > 1:
        front = [
            {
                "epoch": row["epoch"],
                **{
                    objective: row["metrics"][objective]
                    for objective in objectives
                    if objective in row["metrics"]
                },
                "checkpoint": redacted(f"{result.directory}/checkpoints/step-{row['step']:08d}"),
                "chosen": row["epoch"] == best["epoch"],
            }
            for row in result.kept
        ]
        write_json(folder / "front.json", front)


def leave_out(name: str, key: str) -> None:
    """Writes empty reports and a note in `models/<name>` for a matrix item that the param `key` excludes.

    With these outputs DVC deletes those of an earlier run of the item, and other stages can depend on every
    item by name.
    """
    write_json(Path("models", name, "left-out.json"), {"because of": key})
    write_json(REPORTS / name / "metrics.json", {})
    write_json(REPORTS / name / "history.json", [])


def write_localisation(path: Path, models: Mapping[str, Any]) -> None:
    """Writes a CSV table for `dvc plots`: grid pointing game and EPG, one row per model and explanation."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["explanation", "gridpg", "epg"])
    for model, found in models.items():
        for name, scores in found["explanations"].items():
            label = model if name == "bcos" else f"{model}: {name}"
            writer.writerow([label, scores.get("gridpg"), scores.get("epg")])
    write(path, table.getvalue().encode())


def trials_table(metrics: Sequence[str], rows: Sequence[Mapping[str, Any]], trials: int) -> Table:
    """Returns a table of the trials on the Pareto front of a search.

    `stages.tools.search_apply` takes the number in its first column.

    Args:
        metrics: names of the columns; metrics that no trial on the front has measured get none.
        rows: the trials on the front, as `report_search` writes them.
        trials: number of trials of the whole search.
    """
    metrics = [name for name in metrics if any(name in row["metrics"] for row in rows)]
    keys = dict.fromkeys(key for row in rows for key in row["values"])
    heads = (*with_arrows(metrics), *(key.rpartition(".")[2] for key in keys))
    table = Table("trial on the front", *heads, caption=what_a_search_shows(trials), caption_justify="left")
    for row in rows:
        values = (row["values"].get(key, "") for key in keys)
        drawn = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(str(row["trial"]), *(cell(row["metrics"].get(name), ".3f") for name in metrics), *drawn)
    return table


def what_a_search_shows(trials: int) -> str:
    """Returns a note on what a search of `trials` trials can show.

    At least one of n random points lies in the best share q of a space with probability 1 - (1 - q)^n
    (Bergstra and Bengio, 2012). For a probability of 0.95 the share is q = 1 - 0.05^(1/n).
    """
    share = 1 - 0.05 ** (1 / trials)
    return (
        f"What {trials} trials can show: random ones find, in 19 of 20 searches, "
        f"a point in the best {share:.0%} of the space. "
        "Each has one seed: smaller differences than those between seeds say nothing."
    )


def cell(value: float | None, form: str) -> str:
    """Returns a figure for a table, e.g. `0.123` for the form `.3f`; empty if it was not measured."""
    return "" if value is None else f"{value:{form}}"
