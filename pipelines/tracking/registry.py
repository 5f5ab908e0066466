"""The model registry: versions with the evidence that a reviewer needs, loadable without unpickling anything."""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipelines
from pipelines.errors import UserError
from pipelines.storage.files import file_digest
from pipelines.tracking.journal import now
from pipelines.tracking.provenance import git_tags, version_tags
from pipelines.tracking.runs import describe_dataset, flatten
from pipelines.tracking.server import as_default, complaint, connect, prepare, shown, tracking_uri, uploading, where_to_look
from pipelines.tracking.sync import find_or_create_run, log_dataset, log_params_and_tags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from torch import nn

    from pipelines.models import ModelSpec

FILES = {"weights": "model.safetensors", "config": "model.json"}
DIGEST, EVIDENCE = "content.sha256", "evidence.sha256"  # tags of a version
REQUIREMENTS = ("mlflow", "numpy", "pydantic", "safetensors", "timm", "torch", "torchvision")


class TrackingError(UserError, RuntimeError):
    """The registry cannot do it: one line that names the registry and the cause."""


@dataclass(frozen=True)
class Registered:
    """A version in the registry; `created` is False where it was there already."""

    name: str
    version: str
    run_id: str
    digest: str
    created: bool


def register(
    model_directory: str | Path,
    *,
    experiment: str,
    name: str,
    alias: str = "candidate",
    metrics: Mapping[str, float],
    manifest: Mapping[str, Any],
    dataset: str,
    pictures: Iterable[str | Path] = (),
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Registered:
    """Registers the model under `alias` unless this exact version is registered already. Idempotent.

    Two versions are the same if their `model.safetensors` and `model.json` are. A version whose artifacts are not all
    there is passed over. New metrics or pictures of a registered model go to its version.

    Args:
        model_directory: as `pipelines.models.save` writes it.
        experiment: MLflow's experiment, for the run of the registration.
        name: of the registered model.
        alias: moved to the version.
        metrics: name -> value, what the reviewer decides on.
        manifest: of the shards that the metrics were measured on (`manifest.json`).
        dataset: its name.
        pictures: files for the reviewer.
        params: of the run of the registration; nested values.
        tags: further tags of the version.

    Raises:
        TrackingError: the registry does not answer, or refuses.
        FileNotFoundError: no model in the directory.
    """
    from pipelines.models import read_spec

    directory, uri, files = Path(model_directory), tracking_uri(), sorted(map(Path, pictures))
    spec, digest = read_spec(directory), content_digest(directory / file for file in FILES.values())
    with _one_line(uri):
        client = connect(uri)
        found = _find(client, name, digest, directory)
        evidence = describe_dataset(manifest, name=dataset, context="evaluation")
        version = found or _add(client, uri, directory, spec, digest, name, experiment, params or {}, evidence)
        _show_evidence(client, version, spec, metrics, files, evidence, tags or {})
        if str(version.version) != _version_of_alias(client, name, alias):
            client.set_registered_model_alias(name, alias, version.version)
        run = client.get_run(str(version.run_id))
    done = "is in the registry already" if found else "registered"
    look = where_to_look(uri, run.info.experiment_id, run.info.run_id)
    print(f"models:/{name}/{version.version} (alias {alias}) {done}: {look}")
    return Registered(name, str(version.version), run.info.run_id, digest, created=found is None)


def load(uri: str | Path) -> tuple[nn.Module, ModelSpec]:
    """The torch module of a model, in evaluation mode, and its spec; nothing is unpickled.

    Args:
        uri: `models:/name@alias`, `models:/name/version`, or a folder: one that `pipelines.models.save` wrote, or a copy of a
            version's artifacts.

    Raises:
        TrackingError: the registry does not answer, or has no such version.
        FileNotFoundError: no model in the folder.
        WeightsError: the weights are not of the model that its spec describes.
    """
    from pipelines.models import load as load_directory

    if not str(uri).startswith("models:/"):
        folder = Path(uri)
        inner = folder / "artifacts"
        return load_directory(inner if (inner / FILES["config"]).is_file() else folder)
    server = tracking_uri()
    with tempfile.TemporaryDirectory() as folder_name:
        with _one_line(server):
            from mlflow.store.artifact.utils.models import get_model_name_and_version

            client = connect(server)
            name, version = get_model_name_and_version(client, str(uri))
            repository = _artifacts(client, name, version)
            for file in FILES.values():
                repository.download_artifacts(f"artifacts/{file}", folder_name)
        return load_directory(Path(folder_name) / "artifacts")


def content_digest(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of `files`, in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _find(client: MlflowClient, name: str, digest: str, directory: Path) -> ModelVersion | None:
    """The newest version with this content whose artifacts are whole."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST}` = '{digest}'")
    sizes = {f"artifacts/{file}": (directory / file).stat().st_size for file in FILES.values()}
    for version in sorted(versions, key=lambda item: -int(item.version)):
        repository = _artifacts(client, name, version.version)
        there = {item.path: item.file_size for item in repository.list_artifacts("artifacts")}
        top = {item.path for item in repository.list_artifacts(None)}
        if sizes.items() <= there.items() and {"MLmodel", "served.py"} <= top:
            return version
    return None


def _add(
    client: MlflowClient,
    uri: str,
    directory: Path,
    spec: ModelSpec,
    digest: str,
    name: str,
    experiment: str,
    params: Mapping[str, Any],
    dataset: Mapping[str, str],
) -> ModelVersion:
    """A new version of `name` with the model in `directory`, from a run of its own."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)  # first: it refuses a bad name
    tags = {"stage": "register", **version_tags(), **git_tags(), DIGEST: digest}
    head = {"key": secrets.token_hex(8), "stage": "register", "experiment": experiment, "started": now(), "tags": tags}
    run = find_or_create_run(client, uri, head)
    log_params_and_tags(client, run, flatten(params), tags)
    log_dataset(client, run.info.run_id, dataset)
    model_id = _log_model(client, run, directory, spec, name)
    source = f"models:/{model_id}"
    kinds = {"kind": spec.kind, "task": spec.task, "architecture": spec.name, "dataset": dataset["name"]}
    with as_default(uri):
        version = client.create_model_version(name, source, run.info.run_id, tags={**tags, **kinds}, model_id=model_id)
    client.set_terminated(run.info.run_id)
    return version


def _log_model(client: MlflowClient, run: Run, directory: Path, spec: ModelSpec, name: str) -> str:
    """Logs the model with the code that serves it as an output of `run`; its id."""
    prepare()
    import mlflow.pyfunc
    import numpy as np
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    model = client.create_logged_model(run.info.experiment_id, name=name, source_run_id=run.info.run_id, model_type=spec.kind)
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            f"{folder}/model",
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={key: str(directory / file) for key, file in FILES.items()},
            code_paths=[str(Path(pipelines.__file__).parent)],
            pip_requirements=[f"{package}=={installed(package)}" for package in REQUIREMENTS],
            signature=_signature(spec),
            input_example=np.full((1, 3, spec.image_size, spec.image_size), 0.5, dtype=np.float32),
            mlflow_model=Model(model_id=model.model_id, model_uuid=model.model_id, run_id=run.info.run_id),
        )
        with uploading():
            client.log_model_artifacts(model.model_id, f"{folder}/model")
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def _signature(spec: ModelSpec) -> Any:
    """Images (-1, 3, H, W) float32 -> logits (-1, K), with the params of `ServedModel.predict`."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    size = spec.image_size
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, 3, size, size))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(spec.classes)), "logits")]),
        params=ParamSchema([ParamSpec("explain", "boolean", False), ParamSpec("targets", "long", [], shape=(-1,))]),
    )


def _show_evidence(
    client: MlflowClient,
    version: ModelVersion,
    spec: ModelSpec,
    metrics: Mapping[str, float],
    pictures: list[Path],
    dataset: Mapping[str, str],
    tags: Mapping[str, str],
) -> None:
    """Puts metrics, pictures, tags and a description on the version, where they are not those it has."""
    from mlflow.entities import Metric

    parts = [json.dumps([dict(metrics), dict(dataset), dict(tags)], sort_keys=True), content_digest(pictures)]
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    if version.tags.get(EVIDENCE) == digest:
        return
    run_id = str(version.run_id)
    named = {"run_id": run_id, "dataset_name": dataset["name"], "dataset_digest": dataset["digest"]}
    model_id = str(version.source).removeprefix("models:/")
    values = [Metric(key, float(value), now(), 0, model_id=model_id, **named) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=values)
    for picture in pictures:
        client.log_artifact(run_id, str(picture), "pictures")
    for key, value in {**{f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()}, **tags}.items():
        client.set_model_version_tag(version.name, version.version, key, value)
    description = _description(version, spec, metrics, pictures, dataset)
    client.update_model_version(version.name, version.version, description)
    client.set_model_version_tag(version.name, version.version, EVIDENCE, digest)


def _description(
    version: ModelVersion, spec: ModelSpec, metrics: Mapping[str, float], pictures: list[Path], dataset: Mapping[str, str]
) -> str:
    """What a reviewer reads, in markdown."""
    samples = json.loads(dataset["profile"])["samples"]
    rows = [f"| {key} | {value:.4g} |" for key, value in sorted(metrics.items())]
    paths = [f"- `pictures/{path.name}`" for path in pictures] or ["- none"]
    lines = [
        f"**{spec.name}** ({spec.kind}, {spec.task}), {len(spec.classes)} classes, {spec.image_size} x {spec.image_size} px.",
        f"Measured on `{dataset['name']}` ({', '.join(f'{split} {count}' for split, count in samples.items())}).",
        *("", "| metric | value |", "| --- | --- |", *rows, ""),
        *(f"Pictures, artifacts of run `{version.run_id}`:", "", *paths, ""),
        *("```python", "from pipelines.tracking import load", ""),
        *(f'model, spec = load("models:/{version.name}/{version.version}")', "```", ""),
        f"Without this project's code: `mlflow.pyfunc.load_model`; images (N, 3, {spec.image_size}, {spec.image_size}) float32,",
        "RGB in [0, 1]; `params={'explain': True}` gives contribution maps.",
    ]
    return "\n".join(lines)


def _artifacts(client: MlflowClient, name: str, version: str) -> Any:
    """The artifact repository of a version."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    location = client.get_model_version_download_uri(name, version)
    if location.startswith("models:/m-"):
        location = client.get_logged_model(location.removeprefix("models:/")).artifact_location
    return get_artifact_repository(location, tracking_uri=client.tracking_uri)


def _version_of_alias(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that has `alias`."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


@contextmanager
def _one_line(uri: str) -> Iterator[None]:
    """Turns what MLflow and the way to it raise into a `TrackingError`."""
    prepare()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise TrackingError(f"MLflow at {shown(uri)} {complaint(error)}") from error
