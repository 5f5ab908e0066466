"""Writes params.yaml with comments, and docs/params.md: `python -m stages.tools.params [KEY=VALUE ...]`.

KEY=VALUE are overrides like those of `dvc exp run -S`, such as `recipe=cifar10`. Without any, the params are
those of the default recipe. Values and their order come from pipelines/recipes, comments from the models in
pipelines/params. DVC's own composition (`dvc exp run -S`) writes the same values in the same order, but no
comments.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipelines import params
from pipelines.params.base import Strict
from pipelines.params.data import SOURCES
from stages.tools.params_page import page
from stages.tools.params_schema import choices, description, first_sentence, flow, group_of
from stages.tools.search_apply import composition

WIDTH, COLUMN = 110, 34
HEADER = """\
# All params of a run, in the order of the graph of stages (dvc.yaml). docs/params.md has types and ranges.
# A param that stands in several groups has its comment in the first one. `make params` writes this file from
# pipelines/recipes. An experiment (`dvc exp run -S KEY=VALUE`) rewrites it in the same order, without
# comments; `git checkout params.yaml` restores the default run.
"""


def main(overrides: Sequence[str]) -> None:
    """Writes params.yaml for these overrides, and docs/params.md."""
    content = composed(overrides)
    params.validate(content)
    Path("params.yaml").write_text(commented(content))
    Path("docs/params.md").write_text(page(composed([])))


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the params that Hydra composes from the recipes, with all references resolved."""
    return OmegaConf.to_container(composition(overrides), resolve=True)  # type: ignore[return-value]


def commented(content: Mapping[str, Any]) -> str:
    """Returns `content` as the text of params.yaml."""
    return HEADER + "\n".join(_lines(params.Params, content, "", set())) + "\n"


def _lines(model: type[Strict], content: Mapping[str, Any], indent: str, seen: set[str]) -> Iterator[str]:
    """Lines of a group; `seen` are the comments that stand above."""
    for name, value in content.items():
        annotation = model.model_fields[name].annotation
        comment = first_sentence(description(model, name))
        if name == "datasets":
            yield from ("", f"# {comment}", f"{name}:")
            for each, dataset in value.items():
                yield f"  {each}:"
                yield from _lines(SOURCES[dataset["source"]], dataset, "    ", seen)
        elif isinstance(value, Mapping) and (inner := group_of(annotation)):
            new = _once(f"{name}: {comment}", comment, seen)
            yield from ("", f"# {comment}", f"{name}:") if not indent else (_beside(f"{indent}{name}:", new),)
            yield from _lines(inner, value, f"{indent}  ", seen)
        else:
            known = " | ".join(map(str, choices(annotation)))
            comment = f"{comment} ({known})" if " | " in known else comment
            yield from _knob(name, value, _once(f"{name}: {comment}", comment, seen), indent)


def _once(key: str, comment: str, seen: set[str]) -> str:
    """Returns the comment, or nothing if `key` is in `seen`, which gets it."""
    known = key in seen
    seen.add(key)
    return "" if known else comment


def _knob(name: str, value: Any, comment: str, indent: str) -> Iterator[str]:
    """Lines of a knob: with its comment behind it, or above it if they do not fit on a line."""
    line, items = f"{indent}{name}: {flow(value)}", []
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        line, items = f"{indent}{name}:", [f"{indent}- {flow(each)}" for each in value]
    if len(_beside(line, comment)) > WIDTH:
        yield from textwrap.wrap(
            comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        comment = ""
    yield from (_beside(line, comment), *items)


def _beside(text: str, comment: str) -> str:
    """Returns `text` with a comment behind it, aligned with the others."""
    return f"{text:<{COLUMN}}  # {comment}" if comment else text


if __name__ == "__main__":
    main(sys.argv[1:])
