"""Checkpoints whose files are damaged."""

import random
from pathlib import Path

import pytest
import torch

from pipelines.storage.errors import DamagedFileError
from pipelines.training import checkpoints
from tests.support.broken import broken, outcome


def two_checkpoints(directory: Path) -> str:
    """Writes checkpoints of steps 1 and 2; returns the folder of the second."""
    for step in (1, 2):
        state = {"weights": torch.arange(8.0) * step, "step": step}
        checkpoints.save(str(directory), step, state, {"epoch": step}, keep=set(), last=2)
    return checkpoints.folder_of(2, None).at(str(directory))


@pytest.mark.parametrize("name", ["state.pt", "complete.json"])
def test_a_damaged_checkpoint_is_none_or_is_refused_in_one_line(tmp_path, name):
    draw = random.Random(name)
    for number in range(40):
        directory = str(tmp_path / f"{number}")
        path = Path(two_checkpoints(Path(directory)), name)
        path.write_bytes(broken(path.read_bytes(), draw))

        def resume(directory: str = directory) -> None:
            found = checkpoints.newest(directory)
            assert found is not None
            assert (
                checkpoints.load(directory, found["step"])["weights"].tolist()
                == (torch.arange(8.0) * found["step"]).tolist()
            )

        outcome(resume)


def test_a_state_with_another_byte_is_named_with_what_to_do(tmp_path):
    place = two_checkpoints(tmp_path)
    content = bytearray(Path(place, "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path(place, "state.pt").write_bytes(content)
    with pytest.raises(
        DamagedFileError, match=rf"{place}/state.pt: damaged .* delete {place} to go on from an older one"
    ):
        checkpoints.load(str(tmp_path), 2)


def test_steps_are_those_of_the_complete_checkpoints(tmp_path):
    place = two_checkpoints(tmp_path)
    assert checkpoints.steps(str(tmp_path)) == [1, 2]
    Path(place, "complete.json").unlink()
    assert checkpoints.steps(str(tmp_path)) == [1]
