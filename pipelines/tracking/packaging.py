"""What a registered version is made of: the model, the code that serves it, and the packages that this code needs."""

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

CODE = (
    "__init__.py",
    "errors.py",
    "process.py",
    "bcos",
    "models",
    "storage",
)  # of `pipelines`: what `served.py` imports
REQUIREMENTS = (
    "fsspec",
    "mlflow",
    "numpy",
    "safetensors",
    "timm",
    "torch",
    "torchvision",
)  # what that code imports
ARTIFACTS = (
    "weights",
    "config",
    "text_weights",
    "text_config",
)  # names of `model_files` for the code that serves the model


def log_model(client: MlflowClient, run: Run, directory: Path, spec: ModelSpec, name: str) -> str:
    """Logs the model in `directory` with the code that serves it as an output of `run`; its id.

    MLflow lets a registered model have characters in its name that a logged one may not have; the logged one gets `_` for them.
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
            artifacts=dict(
                zip(ARTIFACTS, map(str, model_files(directory)), strict=False)
            ),  # a text tower is not always there
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
    """What the model needs, in the versions installed here, without a build's name (`+cpu`), which no package index knows."""
    packages = REQUIREMENTS + (("open_clip_torch",) if spec.name.startswith("open_clip:") else ())
    return [f"{package}=={installed(package).partition('+')[0]}" for package in packages]


def _copy_code(folder: Path) -> Path:
    """Copies `CODE` to a package `pipelines` in `folder`; its path."""
    package, copy = Path(pipelines.__file__).parent, folder / "pipelines"
    copy.mkdir(parents=True)
    for name in CODE:
        if (package / name).is_dir():
            shutil.copytree(package / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(package / name, copy / name)
    return copy


def _signature(spec: ModelSpec) -> Any:
    """Images (-1, 3, H, W) float32 -> logits (-1, K) or embeddings (-1, D), with the params of `ServedModel.predict`."""
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
