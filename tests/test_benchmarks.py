"""Benchmarks start; those of speed also on machines with torch alone."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import benchmarks

NAMES = [f"benchmarks.{module.name}" for module in pkgutil.iter_modules(benchmarks.__path__)]
READERS = [
    "pipelines.data.shards.reader",
    "pipelines.data.loading.loader",
    "pipelines.data.shards.stored_explanations",
]
OF_SPEED = [
    "benchmarks.step",
    "benchmarks.distillation",
    "benchmarks.guidance",
    "benchmarks.gridpg",
    "benchmarks.clip",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_finds_all_that_it_imports(name):
    importlib.import_module(name)


@pytest.mark.processes
def test_speed_is_measured_and_shards_are_read_without_ray_dvc_mlflow_and_webdataset():
    missing = (
        "import sys; sys.modules.update(dict.fromkeys(['ray', 'dvc', 'mlflow', 'webdataset', 'optuna'])); "
    )
    subprocess.run([sys.executable, "-c", missing + f"import {', '.join(OF_SPEED + READERS)}"], check=True)
