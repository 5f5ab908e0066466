"""Broken params and weights are read, or end with a line that names them. Nothing else is written to.

There are 270 random cases with fixed seeds. `tests/data/test_fuzz.py` has the data sets.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from pipelines.models.weights import read_state_dict
from pipelines.params import load
from tests.support.broken import OK, altered, broken, outcome
from tests.support.fetching import write_files
from tests.support.guard import own_project

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch) -> Iterator[Path]:
    """The only folder to which a test may write."""
    with own_project(tmp_path, monkeypatch) as folder:
        yield folder


# Params -----------------------------------------------------------------------------------------------------


def test_params(project):
    draw = random.Random(0)
    text = (ROOT / "params.yaml").read_bytes()
    whole = yaml.safe_load(text)
    path = project / "params.yaml"
    for number in range(150):
        if number % 3:
            path.write_text(yaml.safe_dump(altered(whole, draw), allow_unicode=False))
        else:
            path.write_bytes(broken(text, draw))
        said = outcome(lambda: load(path), lines=None)
        # The message has a line for each fault.
        assert said == OK or all(line.startswith(f"{path}: ") for line in said.splitlines()), said


# Weights ----------------------------------------------------------------------------------------------------

TENSORS = {"conv.weight": torch.arange(24.0).reshape(4, 3, 1, 2), "conv.bias": torch.ones(4)}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights(project, suffix):
    draw = random.Random(suffix)
    file = io.BytesIO()
    torch.save({"state_dict": TENSORS}, file)
    whole = safetensors.torch.save(TENSORS) if suffix == "safetensors" else file.getvalue()
    for number in range(60):
        path = write_files(project, {f"{number}.{suffix}": broken(whole, draw)}) / f"{number}.{suffix}"
        said = outcome(lambda path=path: read_state_dict(str(path)))
        assert said == OK or path.name in said, said
