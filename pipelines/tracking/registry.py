"""The model registry: versions with the evidence that a reviewer needs. Loading one unpickles nothing."""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import redacted
from pipelines.tracking.candidate import DATA, GATES, GATES_FILE, nominate
from pipelines.tracking.decisions import approval
from pipelines.tracking.journal import now
from pipelines.tracking.packaging import log_model
from pipelines.tracking.provenance import (
    DIGEST,
    EXPERIMENT,
    MODEL,
    TEXT_TOWER,
    content_digest,
    experiment_tags,
    git_tags,
    model_files,
    version_tags,
)
from pipelines.tracking.runs import describe_dataset, flatten
from pipelines.tracking.server import (
    TrackingError,
    alone,
    as_default,
    connect,
    experiment_id,
    in_one_line,
    tracking_uri,
    where_to_look,
)
from pipelines.tracking.sync import find_or_create_run, log_dataset, log_params_and_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from torch import nn

    from pipelines.models import ModelSpec, TextTower

# Tags of a version: a hash of its evidence, and the id of the MLflow run that trained its model.
EVIDENCE, TRAINING = "evidence.sha256", "training.run"


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        name: name of the registered model.
        version: number of the version.
        run_id: MLflow run of the registration.
        digest: sha256 over the model's files.
        created: False if the version existed before.
    """

    name: str
    version: str
    run_id: str
    digest: str
    created: bool

    @property
    def uri(self) -> str:
        """`models:/name/version`, which `load` takes."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Evidence:
    """The evidence on a version that a reviewer sees.

    Attributes:
        version: the version in the registry.
        directory: folder of its model.
        metrics: name -> value.
        pictures: picture files.
        dataset: data set that the metrics were measured on, as `describe_dataset` returns it.
        tags: further tags of the version, besides those of metrics and data set.
        gates: the outcome of each gate.
        has_text_tower: whether the model comes with a text tower.
    """

    version: ModelVersion
    directory: Path
    metrics: Mapping[str, float]
    pictures: list[Path]
    dataset: Mapping[str, str]
    tags: Mapping[str, str]
    gates: Sequence[Mapping[str, Any]]
    has_text_tower: bool


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
    gates: tuple[str, Sequence[Mapping[str, Any]]] | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    compare: str | None = None,
    higher_is_better: bool = True,
) -> Registered:
    """Registers the model unless this exact version is registered already. Idempotent.

    Two versions are the same if the files of their models, text towers included, are the same. A version that
    has lost artifacts does not count. New metrics or pictures of a registered model are added to its version.
    Tags of the version point to the MLflow run that trained the model and to its DVC experiment.

    Args:
        model_directory: folder of the model, as `pipelines.models.save` writes it.
        experiment: MLflow experiment of the registration's run.
        name: name of the registered model.
        alias: alias for the version if no version has it, or if this one is not worse than its holder; see
            `nominate`.
        metrics: name -> value; the reviewer decides on these.
        manifest: content of `manifest.json` of the shards that the metrics were measured on.
        dataset: name of that data set.
        pictures: files for the reviewer.
        gates: outcome of all gates together (`pass`, `fail`, `undecided`), and of each one. A version whose
            gates do not pass gets no alias. `None` if no gates are defined.
        params: params of the registration's run; nested values.
        tags: further tags of the version.
        compare: the one of `metrics` that decides about the alias. If `None`, a version that has the alias
            keeps it.
        higher_is_better: whether a higher value of that metric is better.

    Raises:
        TrackingError: the registry does not answer or refuses a request.
        FileNotFoundError: the directory has no model.
    """
    directory, uri, files = Path(model_directory), tracking_uri(), sorted(map(Path, pictures))
    digest = content_digest(model_files(directory))
    with in_one_line(uri), alone(uri, "register"):
        client = connect(uri)
        found = _find(client, name, digest, directory)
        measured_on = describe_dataset(manifest, name=dataset, context="evaluation")
        version = found or _add(client, uri, directory, digest, name, experiment, params or {}, measured_on)
        origin = _origin(client, experiment_id(client, uri, experiment), digest)
        kept = {key: version.tags.get(key, value) for key, value in origin.items()}  # the first origin stays
        has_text = len(model_files(directory)) > len(MODEL)
        outcome, each_gate = gates or (None, [])
        shown = {**(tags or {}), **kept} | ({GATES: outcome} if outcome else {})
        _show(
            client,
            Evidence(version, directory, metrics, files, measured_on, shown, each_gate, has_text),
        )
        version = client.get_model_version(name, str(version.version))  # with its new tags
        told = nominate(client, version, alias, compare, higher_is_better)
        run = client.get_run(str(version.run_id))
    done = "is in the registry already" if found else "registered"
    look = where_to_look(uri, run.info.experiment_id, run.info.run_id)
    print(f"models:/{name}/{version.version} ({told}) {done}: {look}")
    return Registered(name, str(version.version), run.info.run_id, digest, created=found is None)


def load(uri: str | Path, *, approved: bool = False) -> tuple[nn.Module, ModelSpec]:
    """Returns the torch module of a model, in evaluation mode, and its spec. Unpickles nothing.

    Args:
        uri: `models:/name@alias`, `models:/name/version`, or a folder: one that `pipelines.models.save`
            wrote, or a copy of a version's artifacts.
        approved: refuse a version unless a reviewer approved it, as it is now (`decisions.approval`).

    Raises:
        TrackingError: the registry does not answer or has no such version, or the version is not approved.
        FileNotFoundError: the folder has no model.
        WeightsError: the weights do not fit the model that the spec describes.
    """
    from pipelines.models import load as load_directory

    with model_folder(uri, approved=approved) as folder:
        return load_directory(folder)


def load_text_tower(uri: str | Path, *, approved: bool = False) -> TextTower:
    """Returns the text tower of the model at `uri`, in evaluation mode. Arguments and errors as in `load`."""
    from pipelines.models import load_text_tower as load_from_directory

    with model_folder(uri, approved=approved) as folder:
        return load_from_directory(folder)


@contextmanager
def model_folder(uri: str | Path, *, approved: bool = False) -> Iterator[Path]:
    """Yields a local folder with the files of a model. Arguments as in `load`.

    Raises:
        TrackingError: the registry does not answer or has no such version, or the version is not approved.
    """
    if not str(uri).startswith("models:/"):
        if approved:
            raise TrackingError(f"{uri}: only a registered version can be approved (models:/NAME/VERSION)")
        folder = Path(uri)
        inner = folder / "artifacts"
        yield inner if all(path.is_file() for path in model_files(inner)) else folder
        return
    server = tracking_uri()
    with tempfile.TemporaryDirectory() as folder_name:
        with in_one_line(server):
            from mlflow.store.artifact.utils.models import get_model_name_and_version

            client = connect(server)
            name, version = get_model_name_and_version(client, str(uri))
            digest = approval(client, str(uri), name, str(version)).digest if approved else None
            repository = _artifacts(client, name, version)
            there = {item.path for item in repository.list_artifacts("artifacts")}
            with_text = all(f"artifacts/{file}" in there for file in TEXT_TOWER)
            for file in MODEL + (TEXT_TOWER if with_text else ()):
                repository.download_artifacts(f"artifacts/{file}", folder_name)
        downloaded = Path(folder_name) / "artifacts"
        if digest is not None and content_digest(model_files(downloaded)) != digest:
            raise TrackingError(f"models:/{name}/{version}: its files are not those that were approved")
        yield downloaded


def _find(client: MlflowClient, name: str, digest: str, directory: Path) -> ModelVersion | None:
    """Returns the newest version of `name` with this content and all its artifacts, `None` without one."""
    # The filter leaves the name out, because it may have quotes, which MLflow's filters cannot escape.
    versions = [
        item for item in client.search_model_versions(f"tags.`{DIGEST}` = '{digest}'") if item.name == name
    ]
    sizes = {f"artifacts/{path.name}": path.stat().st_size for path in model_files(directory)}
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
    digest: str,
    name: str,
    experiment: str,
    params: Mapping[str, Any],
    dataset: Mapping[str, str],
) -> ModelVersion:
    """Creates a version of `name` with the model in `directory`, under an MLflow run of its own."""
    from pipelines.models import read_spec  # imports PyTorch, which a version that exists does not need

    spec = read_spec(directory)
    _create_name(client, name)  # first, because MLflow refuses an invalid name here
    tags = {"stage": "register", **version_tags(), **git_tags(), **experiment_tags(), DIGEST: digest}
    head = {
        "key": secrets.token_hex(8),
        "stage": "register",
        "experiment": experiment,
        "started": now(),
        "tags": tags,
    }
    run = find_or_create_run(client, uri, head)
    log_params_and_tags(client, run, flatten(params), tags)
    log_dataset(client, run.info.run_id, dataset)
    model_id = log_model(client, run, directory, spec, name)
    source = f"models:/{model_id}"
    kinds = {"kind": spec.kind, "task": spec.task, "architecture": spec.name, "dataset": dataset["name"]}
    with as_default(uri):
        version = client.create_model_version(
            name, source, run.info.run_id, tags={**tags, **kinds}, model_id=model_id
        )
    client.set_terminated(run.info.run_id)
    return version


def _create_name(client: MlflowClient, name: str) -> None:
    """Creates the registered model `name` unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _origin(client: MlflowClient, experiment: str, digest: str) -> dict[str, str]:
    """Returns tags that name the newest run that trained a version's model, and the DVC experiment."""
    runs = client.search_runs(
        [experiment], f"tags.`{DIGEST}` = '{digest}'", order_by=["attributes.start_time DESC"]
    )
    training = next((run for run in runs if run.data.tags.get("stage") != "register"), None)
    if training is None:
        return experiment_tags()
    name = training.data.tags.get(EXPERIMENT)
    return {TRAINING: training.info.run_id, **({EXPERIMENT: name} if name else {}), **experiment_tags()}


def _show(client: MlflowClient, evidence: Evidence) -> None:
    """Puts metrics, pictures, tags and a description on the version unless it has this very evidence."""
    from mlflow.entities import Metric

    version, metrics, dataset = evidence.version, evidence.metrics, evidence.dataset
    content = [dict(metrics), dict(dataset), dict(evidence.tags), list(evidence.gates)]
    parts = [json.dumps(content, sort_keys=True), content_digest(evidence.pictures)]
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    if version.tags.get(EVIDENCE) == digest:
        return
    run_id = str(version.run_id)
    named = {"run_id": run_id, "dataset_name": dataset["name"], "dataset_digest": dataset["digest"]}
    model_id = str(version.source).removeprefix("models:/")
    values = [
        Metric(key, float(value), now(), 0, model_id=model_id, **named) for key, value in metrics.items()
    ]
    client.log_batch(run_id, metrics=values)
    for picture in evidence.pictures:
        client.log_artifact(run_id, str(picture), "pictures")
    if evidence.gates:
        client.log_text(run_id, json.dumps(list(evidence.gates), indent=1), GATES_FILE)
    figures = {f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()}
    for key, value in {**figures, DATA: dataset["digest"], **evidence.tags}.items():
        client.set_model_version_tag(version.name, version.version, key, redacted(value))
    client.update_model_version(version.name, version.version, redacted(_description(evidence)))
    client.set_model_version_tag(version.name, version.version, EVIDENCE, digest)


def _description(evidence: Evidence) -> str:
    """Returns the version's description for a reviewer, in Markdown."""
    from pipelines.models import read_spec

    version, dataset, tags = evidence.version, evidence.dataset, evidence.tags
    spec = read_spec(evidence.directory)
    origin = {"MLflow run": tags.get(TRAINING), "DVC experiment": tags.get(EXPERIMENT)}
    led = [f"{what} `{value}`" for what, value in origin.items() if value]
    samples = json.loads(dataset["profile"])["samples"]
    rows = [f"| {key} | {value:.4g} |" for key, value in sorted(evidence.metrics.items())]
    paths = [f"- `pictures/{path.name}`" for path in evidence.pictures] or ["- none"]
    embeds = spec.task == "embedding"
    gives = "embeddings" if embeds else f"{len(spec.classes)} classes"
    uri = f"models:/{version.name}/{version.version}"
    lines = [
        f"**{spec.name}** ({spec.kind}, {spec.task}), {gives}, {spec.image_size} x {spec.image_size} px.",
        f"Measured on `{dataset['name']}` "
        f"({', '.join(f'{split} {count}' for split, count in samples.items())}).",
        *([f"Trained by {', '.join(led)}."] if led else []),
        *("", "| metric | value |", "| --- | --- |", *rows, ""),
        *(f"Pictures, artifacts of run `{version.run_id}`:", "", *paths, ""),
        *(
            "```python",
            f"from pipelines.tracking import load{', load_text_tower' * evidence.has_text_tower}",
            "",
        ),
        *(
            f"model, spec = load({uri!r})",
            *[f"texts = load_text_tower({uri!r})"] * evidence.has_text_tower,
            "```",
            "",
        ),
        f"Without this project's code: `mlflow.pyfunc.load_model`; "
        f"images (N, 3, {spec.image_size}, {spec.image_size}) float32,",
        "RGB in [0, 1]; "
        + ("it gives embeddings." if embeds else "`params={'explain': True}` gives contribution maps."),
    ]
    return "\n".join(lines)


def _artifacts(client: MlflowClient, name: str, version: str) -> Any:
    """Returns MLflow's artifact repository of a version."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    location = client.get_model_version_download_uri(name, version)
    if location.startswith("models:/m-"):
        location = client.get_logged_model(location.removeprefix("models:/")).artifact_location
    return get_artifact_repository(location, tracking_uri=client.tracking_uri)
