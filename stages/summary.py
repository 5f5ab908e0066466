"""What `make repro` says at its end: the figures, and where to look next."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from pipelines import tracking
from stages.common import REPORTS


def main() -> None:
    """Prints the evaluated models side by side, and where their pictures and the registered version are."""
    metrics = json.loads((REPORTS / "evaluate/metrics.json").read_text())
    version = json.loads((REPORTS / "register.json").read_text())
    console = Console(highlight=False)
    table = Table("model", "accuracy or F1", "explanation", "grid pointing game", "energy pointing game", "unexplained share")
    for name, of_model in metrics["models"].items():
        for row, (explanation, scores) in enumerate(of_model["explanations"].items()):
            right = of_model.get("accuracy", of_model.get("f1"))  # multiclass, multilabel
            first = (name, f"{right:.1%}") if row == 0 else ("", "")
            cells = [scores.get(key) for key in ("gridpg", "epg", "unexplained_share")]
            table.add_row(*first, explanation, *("" if cell is None else f"{cell:.3g}" for cell in cells))
    console.print(table)
    console.print(f"pictures   {REPORTS}/evaluate/pictures")
    console.print("metrics    dvc metrics show; dvc plots show (after `. .venv/bin/activate`)")
    console.print(f"registry   {version['uri']} (version {version['version']})")
    console.print(f"review     {tracking.where_to_look(tracking.tracking_uri())}", soft_wrap=True)


if __name__ == "__main__":
    main()
