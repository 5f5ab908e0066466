"""Runs a Ray driver in a process of its own, for the accident `kill driver` of `tests.support.toy`."""

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
    """Runs `script` in a process of its own and asserts that SIGKILL ends it.

    The script can use `toy` and `Path`, and starts a Ray of its own.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(ROOT)
    }
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], env=environment, timeout=240, check=False
    )
    assert process.returncode == -signal.SIGKILL
