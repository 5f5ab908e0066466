"""What `make repro` says at its end: the figures, and where to look next."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines import tracking
from pipelines.params import load
from pipelines.workflow.places import REPORTS
from pipelines.workflow.reports import trials_table


def main() -> None:
    """Prints the evaluated models side by side, and where their pictures and the registered version are."""
    metrics = json.loads((REPORTS / "evaluate/metrics.json").read_text())
    students = json.loads((REPORTS / "evaluate/students.json").read_text())
    guidance = json.loads((REPORTS / "evaluate_guidance/metrics.json").read_text())
    best = json.loads((REPORTS / "search/front.json").read_text())
    version = json.loads((REPORTS / "register.json").read_text())
    console = Console(highlight=False)
    table = Table("model", "accuracy or F1", "explanation", "grid pointing game", "energy pointing game", "unexplained share")
    for name, of_model in metrics["models"].items():
        for row, (explanation, scores) in enumerate(of_model["explanations"].items() or [("", {})]):
            right = of_model.get("accuracy", of_model.get("f1"))  # multiclass, multilabel
            first = (name, f"{right:.1%}") if row == 0 else ("", "")
            cells = [scores.get(key) for key in ("gridpg", "epg", "unexplained_share")]
            table.add_row(*first, explanation, *("" if cell is None else f"{cell:.3g}" for cell in cells))
    console.print(table)
    console.print(followers(students["models"]))
    for split, found in guidance.items():
        console.print(guided(split, found["models"]))
    console.print(trials_table(load().search.metrics, best))
    console.print(f"pictures   {REPORTS}/evaluate/pictures")
    console.print("metrics    dvc metrics show; dvc plots show (after `. .venv/bin/activate`)")
    console.print(f"registry   {version['uri']}")
    console.print(f"review     {tracking.where_to_look(tracking.tracking_uri())}", soft_wrap=True)


def followers(models: dict[str, Any]) -> Table:
    """The students beside their teacher."""
    table = Table(
        "student", "accuracy or F1", "agreement", "explanation similarity", "grid pointing game", "energy pointing game"
    )
    for name, found in models.items():
        scores: dict[str, float] = next(iter(found["explanations"].values()), {})
        right = [found.get("accuracy", found.get("f1")), found.get("agreement")]
        cells = [found.get("explanation_similarity"), scores.get("gridpg_own_grids"), scores.get("epg")]
        shown = ["" if share is None else f"{share:.1%}" for share in right] + ["" if x is None else f"{x:.3g}" for x in cells]
        table.add_row(name, *shown)
    return table


def guided(split: str, models: dict[str, Any]) -> Table:
    """The classifier before and after guidance."""
    keys = ("epg", "on_object_epg", "size_corrected_epg", "iou")
    heads = ("energy pointing game", "on the object", "size-corrected", "IoU")
    table = Table(f"classifier ({split})", "F1 or accuracy", "explanation", *heads)
    for name, found in models.items():
        for explanation, scores in found["explanations"].items() or [("", {})]:
            cells = [scores.get(key) for key in keys]
            right = found.get("f1", found.get("accuracy"))
            table.add_row(name, f"{right:.1%}", explanation, *("" if cell is None else f"{cell:.3g}" for cell in cells))
    return table


if __name__ == "__main__":
    main()
