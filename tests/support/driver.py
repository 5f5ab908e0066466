"""A driver of Ray in a process of its own, which an accident `kill driver` of `tests.support.toy` kills."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRELUDE = """
import os
from pathlib import Path
from ray import cloudpickle
from tests.support import toy
os.environ["TOY_DRIVER"] = str(os.getpid())
cloudpickle.register_pickle_by_value(toy)
"""


def run_until_killed(script: str) -> None:
    """Runs `script`, which has `toy`, `Path` and a Ray of its own; raises `AssertionError` unless it ends by SIGKILL."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(ROOT)
    }
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], env=environment, timeout=240, check=False
    )
    assert process.returncode == -signal.SIGKILL
