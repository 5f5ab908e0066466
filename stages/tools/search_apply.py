"""`python -m stages.tools.search_apply TRIAL`: runs a DVC experiment with the values of a trial.

Further arguments go to `dvc exp run` (`--queue`, `--temp`, `--name NAME`). With `--print`, the command is
printed and not run.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from pipelines import params
from pipelines.storage.files import required_json
from pipelines.workflow.places import REPORTS
from pipelines.workflow.running import stage


def main(arguments: Sequence[str]) -> int:
    """Runs `dvc exp run` for the trial whose number is the first argument; returns its exit status."""
    with stage():
        trials = required_json(REPORTS / "search/trials.json")
        number, *others = arguments
        if not number.isdecimal() or int(number) >= len(trials):
            raise params.ParamsError(
                f"{number}: there is no such trial; {REPORTS}/search/trials.json has 0 to {len(trials) - 1}"
            )
        params.check_names(trials[int(number)]["values"], f"trial {number}")
        content = DictConfig(yaml.safe_load(Path("params.yaml").read_text()))
        for key, value in trials[int(number)]["values"].items():
            OmegaConf.update(content, key, value, merge=False)
    command = ["dvc", "exp", "run", *(part for change in changes(content) for part in ("-S", change))]
    print(shlex.join(command), flush=True)
    return 0 if "--print" in others else subprocess.run([*command, *others], check=False).returncode


def changes(content: DictConfig) -> list[str]:
    """Returns the overrides for `-S` that compose `content`: the recipe, and the differences from it.

    Keys that the recipe interpolates from other keys (`${...}`) follow those. They are overridden only if
    their value in `content` is another.
    """
    groups, wanted = [f"recipe={content.recipe}"], leaves_of(content)
    if composition(groups).dataset != content.dataset:
        groups.append(f"dataset={content.dataset}")
    composed = leaves_of(composition(groups))
    links = [key for key, value in composed.items() if "${" in str(value)]
    known, own = (
        {key: each for key, each in some.items() if not under(key, links)} for some in (composed, wanted)
    )
    gone = [f"~{key}" for key in dict.fromkeys(missing_in(content, key) for key in known if key not in own)]
    differing = [key for key, value in own.items() if key not in known or known[key] != value]
    first = [
        *groups,
        *gone,
        *(f"{'' if key in known else '++'}{key}={in_hydras_grammar(own[key])}" for key in differing),
    ]
    followed = composition(first)
    pairs = {link: [plain(OmegaConf.select(each, link)) for each in (content, followed)] for link in links}
    return [
        *first,
        *(
            f"{link}={in_hydras_grammar(value)}"
            for link, (value, follows) in pairs.items()
            if value != follows
        ),
    ]


def composition(overrides: Sequence[str]) -> DictConfig:
    """Returns the params that Hydra composes from the recipes."""
    with initialize_config_dir(str(Path("pipelines/recipes").absolute()), version_base=None):
        return compose("config", overrides=list(overrides))


def leaves_of(content: DictConfig) -> dict[str, Any]:
    """Returns the leaves of `content` by their keys, with interpolations (`${...}`) unresolved."""
    return params.leaves(OmegaConf.to_container(content, resolve=False))  # type: ignore[arg-type]


def missing_in(content: DictConfig, key: str) -> str:
    """The outermost part of `key` that `content` does not have."""
    parts = key.split(".")
    outer = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((part for part in outer if OmegaConf.select(content, part) is None), key)


def plain(value: Any) -> Any:
    """Returns `value` without OmegaConf's own types, with interpolations resolved."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def under(key: str, places: Iterable[str]) -> bool:
    """Returns True if `key` is one of `places` or lies in one."""
    return any(f"{key}.".startswith(f"{place}.") for place in places)


def in_hydras_grammar(value: Any) -> str:
    """Returns `value` in the grammar of Hydra's overrides."""
    if isinstance(value, list):
        return f"[{', '.join(map(in_hydras_grammar, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {in_hydras_grammar(each)}" for key, each in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    if value.isidentifier() and yaml.safe_load(value) == value:
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [""]))
