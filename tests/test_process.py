"""The cores that this process may use, and the paths of its sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import process
from pipelines.process import cpu_count, cpu_quotas

ROOT = Path(__file__).parents[1]


def system(root: Path, **files: str) -> Path:
    """Writes files below `root`; `__` in a name stands for `/`."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # The quota of a parent group
        ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__cpu.max": "150000 100000\n"}, [1.5]),
        ({"proc__self__cgroup": "0::/a\n", "sys__fs__cgroup__a__cpu.max": "max 100000\n"}, []),
        # A container that sees its own group as the root
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "400000 200000\n"}, [2.0]),
        (
            {
                "proc__self__cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/1\n",  # the path on the host
                "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us": "50000\n",
                "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n",
            },
            [0.5],
        ),
        (
            {
                "proc__self__cgroup": "2:cpu:/job\n0::/other\n",
                "sys__fs__cgroup__cpu__job__cpu.cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__job__cpu.cfs_period_us": "100000\n",
                "sys__fs__cgroup__unified__other__cpu.max": "300000 100000\n",
            },
            [3.0],
        ),
        ({"proc__self__cgroup": "3:cpuset:/x\n", "sys__fs__cgroup__cpuset__x__cpu.cfs_quota_us": "1\n"}, []),
        ({}, []),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, files: dict[str, str], expected: list[float]) -> None:
    assert list(cpu_quotas(system(tmp_path, **files))) == expected


@pytest.mark.parametrize(("quotas", "cores"), [([], 6), ([2.5, 9.0], 3), ([0.3], 1), ([64.0], 6)])
def test_cores_follow_affinity_and_the_tightest_quota(
    monkeypatch: pytest.MonkeyPatch, quotas: list[float], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(process, "cpu_quotas", lambda: iter(quotas))
    assert cpu_count() == cores


def test_processes_meet_in_a_short_folder_if_tmpdir_is_long(tmp_path: Path) -> None:
    long = tmp_path / ("scratch/" * 8) / ("x" * 30)
    long.mkdir(parents=True)
    script = """
import tempfile
from multiprocessing.connection import Listener
import pipelines
with Listener(family="AF_UNIX") as listener:
    print(tempfile.gettempdir(), len(listener.address))
"""
    ran = run_with(script, TMPDIR=str(long))
    assert ran.returncode == 0, ran.stderr
    folder, length = ran.stdout.split()
    assert folder == str(long)  # only sockets move; TMPDIR is respected otherwise
    assert int(length) <= process.SOCKET_NAME


def run_with(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False
    )
