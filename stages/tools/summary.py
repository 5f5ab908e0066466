"""Prints the summary at the end of `make repro`: the figures, and where to look next."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines import tracking
from pipelines.params import load
from pipelines.storage.files import required_json
from pipelines.workflow.places import REPORTS
from pipelines.workflow.reports import cell, trials_table
from pipelines.workflow.running import stage


def main() -> None:
    """Prints tables of the evaluated models, and where to find their pictures and the registered version."""
    metrics = required_json(REPORTS / "evaluate/metrics.json")
    students = required_json(REPORTS / "evaluate/students.json")
    guidance = required_json(REPORTS / "evaluate_guidance/metrics.json")
    best, trials = (required_json(REPORTS / f"search/{name}.json") for name in ("front", "trials"))
    version = required_json(REPORTS / "register.json")
    console = Console(highlight=False)
    table = Table(
        "model",
        "accuracy or F1",
        "explanation",
        "grid pointing game",
        "energy pointing game",
        "unexplained share",
    )
    for name, of_model in metrics["models"].items():
        for row, (explanation, scores) in enumerate(of_model["explanations"].items() or [("", {})]):
            right = of_model.get("accuracy", of_model.get("f1"))  # multiclass or multilabel
            first = (name, cell(right, ".1%")) if row == 0 else ("", "")
            figures = [scores.get(key) for key in ("gridpg", "epg", "unexplained_share")]
            table.add_row(*first, explanation, *(cell(figure, ".3g") for figure in figures))
    console.print(table)
    console.print(followers(students["models"]))
    for split, found in guidance.items():
        console.print(guided(split, found["models"]))
    console.print(trials_table(load().search.metrics, best, len(trials)))
    console.print(f"pictures   {REPORTS}/evaluate/pictures")
    console.print(f"metrics    {REPORTS}/*/metrics.json; dvc plots show (after `. .venv/bin/activate`)")
    console.print(f"gates      {required_json(REPORTS / 'gates.json')['outcome'] or 'none'}")
    console.print(f"registry   {version['uri']}")
    console.print(f"review     {tracking.where_to_look(tracking.tracking_uri())}", soft_wrap=True)


def followers(models: dict[str, Any]) -> Table:
    """Returns the table of the students and their teacher."""
    table = Table(
        "student",
        "accuracy or F1",
        "agreement",
        "explanation similarity",
        "grid game, own grids",
        "energy pointing game",
    )
    for name, found in models.items():
        scores: dict[str, float] = next(iter(found["explanations"].values()), {})
        right = [found.get("accuracy", found.get("f1")), found.get("agreement")]
        figures = [found.get("explanation_similarity"), scores.get("gridpg_own_grids"), scores.get("epg")]
        table.add_row(
            name, *(cell(share, ".1%") for share in right), *(cell(figure, ".3g") for figure in figures)
        )
    return table


def guided(split: str, models: dict[str, Any]) -> Table:
    """Returns the table of the classifier before and after guidance, on one split."""
    keys = ("epg", "on_object_epg", "size_corrected_epg", "iou", "iou_threshold", "iou_at_0.5")
    heads = ("energy pointing game", "on the object", "size-corrected", "IoU", "at threshold", "IoU at 0.5")
    table = Table(f"classifier ({split})", "F1 or accuracy", "explanation", *heads)
    for name, found in models.items():
        for explanation, scores in found["explanations"].items() or [("", {})]:
            right = cell(found.get("f1", found.get("accuracy")), ".1%")
            table.add_row(name, right, explanation, *(cell(scores.get(key), ".3g") for key in keys))
    return table


if __name__ == "__main__":
    with stage():
        main()
