"""Packages a model for the registry, with the code that serves it and the requirements of this code."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipelines
from pipelines.tracking.provenance import model_files
from pipelines.tracking.server import prepare, uploading

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from pipelines.models import ModelSpec

# Files and folders of `pipelines` that `served.py` imports.
CODE = ("__init__.py", "errors.py", "process.py", "bcos", "models", "storage")
# Packages that this code imports.
REQUIREMENTS = ("fsspec", "mlflow", "numpy", "safetensors", "timm", "torch", "torchvision")
# Names under which `served.py` finds the files that `model_files` lists, in the same order.
ARTIFACTS = ("weights", "config", "text_weights", "text_config")


def log_model(client: MlflowClient, run: Run, directory: Path, spec: ModelSpec, name: str) -> str:
    """Logs the model in `directory` and the code that serves it as an output of `run`; returns its id.

    The names of MLflow's registered models may have characters that those of logged models may not have. The
    logged model's name has `_` instead.
    """
    prepare()
    import mlflow.pyfunc
    import numpy as np
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    logged, origin = re.sub(r"[/:.%\"']", "_", name), run.info
    model = client.create_logged_model(
        origin.experiment_id, name=logged, source_run_id=origin.run_id, model_type=spec.kind
    )
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            f"{folder}/model",
            python_model=str(Path(__file__).with_name("served.py")),
            # Not strict, because only some models have the two files of a text tower.
            artifacts=dict(zip(ARTIFACTS, map(str, model_files(directory)), strict=False)),
            code_paths=[str(_copy_code(Path(folder, "code")))],
            pip_requirements=requirements(spec),
            signature=_signature(spec),
            input_example=np.full((1, 3, spec.image_size, spec.image_size), 0.5, dtype=np.float32),
            mlflow_model=Model(model_id=model.model_id, model_uuid=model.model_id, run_id=origin.run_id),
        )
        with uploading():
            client.log_model_artifacts(model.model_id, f"{folder}/model")
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(origin.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def requirements(spec: ModelSpec) -> list[str]:
    """Returns the packages that the served model needs, pinned to the versions installed here.

    A build's label such as `+cpu` is dropped, because package indices do not have it.
    """
    packages = REQUIREMENTS + (("open_clip_torch",) if spec.name.startswith("open_clip:") else ())
    return [f"{package}=={installed(package).partition('+')[0]}" for package in packages]


def _copy_code(folder: Path) -> Path:
    """Copies `CODE` to a package `pipelines` in `folder` and returns the path of the package."""
    package, copy = Path(pipelines.__file__).parent, folder / "pipelines"
    copy.mkdir(parents=True)
    for name in CODE:
        if (package / name).is_dir():
            shutil.copytree(package / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(package / name, copy / name)
    return copy


def _signature(spec: ModelSpec) -> Any:
    """Signature of `ServedModel.predict`: images (-1, 3, H, W) to logits (-1, K) or embeddings (-1, D)."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    from pipelines.models.clip import embedding_width

    size = spec.image_size
    name, width = "logits", len(spec.classes)
    if spec.task == "embedding":
        name, width = "embeddings", embedding_width(spec.name, spec.options)
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, 3, size, size))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, width), name)]),
        params=ParamSchema(
            [ParamSpec("explain", "boolean", False), ParamSpec("targets", "long", [], shape=(-1,))]
        ),
    )
