"""`python -m stages.search_apply TRIAL`: the params as they are, with the values of a trial of the search, as a DVC experiment.

Further arguments go to `dvc exp run` (`--queue`, `--temp`, `--name NAME`); with `--print` its command is shown, not run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipelines import params
from stages.common import REPORTS, stage


def main(arguments: Sequence[str]) -> int:
    """Runs `dvc exp run` for the trial of the first argument; its exit status."""
    with stage():
        trials = json.loads((REPORTS / "search/trials.json").read_text())
        number, *others = arguments
        if not number.isdecimal() or int(number) >= len(trials):
            raise params.ParamsError(f"{number}: there is no such trial; {REPORTS}/search/trials.json has 0 to {len(trials) - 1}")
        content = params.leaves(yaml.safe_load(Path("params.yaml").read_text())) | trials[int(number)]["values"]
    command = ["dvc", "exp", "run", *(part for change in changes(content) for part in ("-S", change))]
    print(" ".join(f"'{part}'" if set(part) & set(" []{}~") else part for part in command), flush=True)
    return 0 if "--print" in others else subprocess.run([*command, *others], check=False).returncode


def changes(content: Mapping[str, Any]) -> list[str]:
    """What `-S` takes to compose params of this flat `content`: what differs from its recipe's, and the recipe."""
    with initialize_config_dir(str(Path("pipelines/recipes").absolute()), version_base=None):
        config = compose("config", overrides=[f"recipe={content['recipe']}"])
    composed = params.leaves(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    gone = [f"~{key}" for key in composed if key not in content]
    differing = [key for key, value in content.items() if key != "recipe" and (key not in composed or composed[key] != value)]
    return [f"recipe={content['recipe']}", *gone, *(f"{'' if k in composed else '+'}{k}={shown(content[k])}" for k in differing)]


def shown(value: Any) -> str:
    """`value` in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    if value.isidentifier() and yaml.safe_load(value) == value:
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [""]))
