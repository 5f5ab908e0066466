"""The manifests conform to the schemas and references of Kubernetes, Ray, KubeRay and compose."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from pipelines.training.launch import RAY_ENVIRONMENT

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra/manifests"
MANIFESTS = sorted(INFRA.glob("*.yaml"))

KUBERNETES = "1.34"
# Fields of KubeRay 1.6's API reference; Kubernetes' own schema checks the pods. A type is `str`, `int`,
# `bool`, `dict` (any strings), `object` (anything), [type] or {field: type}.
CLUSTER = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"version": str, "upscalingMode": str, "idleTimeoutSeconds": int},
    "authOptions": {"mode": str, "secretName": str},
    "headGroupSpec": {"rayStartParams": dict, "template": object},
    "workerGroupSpecs": [
        {
            **{
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "rayStartParams": dict,
            },
            "template": object,
        }
    ],
}
JOB = {
    **{"entrypoint": str, "runtimeEnvYAML": str, "submissionMode": str, "shutdownAfterJobFinishes": bool},
    **{
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "rayClusterSpec": CLUSTER,
    },
}
HEAD = {"apiVersion": str, "kind": str, "metadata": {"name": str}}
KINDS = {"RayCluster": {**HEAD, "spec": CLUSTER}, "RayJob": {**HEAD, "spec": JOB}}
SERVICE = {
    **{
        "image": str,
        "command": (str, list),
        "environment": dict,
        "volumes": list,
        "ports": list,
        "restart": str,
    },
    "healthcheck": {"test": list, "interval": str, "retries": int},
    "depends_on": dict,
}


def wrong(value: Any, type_: Any, place: str = "") -> list[str]:
    """Returns the places in `value` that do not have the type `type_`."""
    if isinstance(type_, dict):
        if not isinstance(value, dict):
            return [f"{place}: not a mapping"]
        unknown = [f"{place}.{key}: no such field" for key in value.keys() - type_.keys()]
        return unknown + [
            line
            for key in value.keys() & type_.keys()
            for line in wrong(value[key], type_[key], f"{place}.{key}")
        ]
    if isinstance(type_, list):
        if not isinstance(value, list):
            return [f"{place}: not a list"]
        return [
            line for number, item in enumerate(value) for line in wrong(item, type_[0], f"{place}[{number}]")
        ]
    if type_ is dict:
        good = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        return [] if good or "depends_on" in place else [f"{place}: not a mapping of strings"]
    return (
        []
        if isinstance(value, type_) and not (type_ is int and isinstance(value, bool))
        else [f"{place}: {value!r}"]
    )


def read(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def clusters() -> list[Any]:
    return [read("raycluster.yaml")["spec"], read("rayjob.yaml")["spec"]["rayClusterSpec"]]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_has_these_fields(name: str) -> None:
    manifest = read(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert wrong(manifest, KINDS[manifest["kind"]]) == []


def pods() -> list[Any]:
    return [
        group["template"]
        for cluster in clusters()
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


def test_kubernetes_own_schema_takes_the_pods_and_finds_what_is_wrong() -> None:
    kind = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
    for template in pods():
        kubernetes_validate.validate({**kind, "template": template}, KUBERNETES, strict=True)
        template["spec"]["containers"][0]["imagePolicy"] = "Always"
        with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
            kubernetes_validate.validate({**kind, "template": template}, KUBERNETES, strict=True)


def test_the_check_of_fields_finds_what_is_wrong() -> None:
    manifest = read("raycluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["minReplica"] = 0
    manifest["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert sorted(wrong(manifest, KINDS["RayCluster"])) == [
        ".spec.headGroupSpec.rayStartParams: not a mapping of strings",
        ".spec.workerGroupSpecs[0].minReplica: no such field",
    ]


def test_gpu_workers_scale_from_none_with_shared_memory_and_a_token() -> None:
    for cluster in clusters():
        (group,) = cluster["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
        assert cluster["enableInTreeAutoscaling"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert cluster["authOptions"] == {"mode": "token", "secretName": "bcos-ray"}
        for pod in (group["template"]["spec"], cluster["headGroupSpec"]["template"]["spec"]):
            mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
            assert set(mounts.values()) == set(volumes)
            assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"


def test_the_cache_of_shards_fits_its_volume() -> None:
    for cluster in clusters():
        pod = cluster["workerGroupSpecs"][0]["template"]["spec"]
        env = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        size = next(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "cache")
        assert env["SHARD_CACHE"] == "/cache"
        assert float(env["SHARD_CACHE_GB"]) * 1e9 < int(size.removesuffix("Gi")) * 2**30


def test_cuda_of_the_image_is_that_of_the_lock() -> None:
    (base,) = re.findall(r"^ARG BASE=nvidia/cuda:(\d+)\.", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert re.findall(r"^nvidia-cudnn-cu(\d+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE) == [
        base
    ]


def test_jobs_have_the_environment_that_submitted_ones_get() -> None:
    job = yaml.safe_load((INFRA / "rayjob.yaml").read_text())
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"] == RAY_ENVIRONMENT


def test_ray_is_that_of_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    for cluster in clusters():
        assert f"ray=={cluster['rayVersion']}\n" in lock
        assert cluster["rayVersion"] == version("ray")


def test_rays_own_schema_takes_the_cluster_launchers_file() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(read("cluster-aws.yaml"), schema)


def test_compose_has_these_fields_and_takes_secrets_from_the_environment() -> None:
    content = read("compose.yaml")
    assert set(content) == {"name", "services", "volumes"}
    for name, service in content["services"].items():
        assert wrong(service, SERVICE, name) == []
        for key, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|KEY", key):
                assert re.fullmatch(r"\$\{[A-Z_]+(:\?[\w ]+|:-)?\}", value)


def test_no_service_of_compose_is_published_beyond_this_machine_unless_it_is_asked_for() -> None:
    ports = {name: service.get("ports", []) for name, service in read("compose.yaml")["services"].items()}
    assert {name for name, published in ports.items() if published} == {"mlflow"}
    assert ports["mlflow"] == ["${PUBLISH:-127.0.0.1}:5000:5000"]


def start_mlflow(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs the command of compose's `mlflow` with a stub that prints its arguments, one per line."""
    service = read("compose.yaml")["services"]["mlflow"]
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    for name, value in service["environment"].items():
        if found := re.fullmatch(r"\$\{([A-Z_]+)(?:\?[^}]*|:-([^}]*))?\}", str(value)):
            value = settings.get(found[1], found[2] or "")
        environment[name] = str(value)
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "auth.ini")
    (folder / "mlflow").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "mlflow").chmod(0o755)
    command = [part.replace("$$", "$") for part in service["command"]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_composes_mlflow_answers_its_own_hosts_and_has_no_password_on_its_command_line(
    tmp_path: Path,
) -> None:
    done = start_mlflow(tmp_path, POSTGRES_PASSWORD="s3cr3t", MINIO_ROOT_PASSWORD="s3cr3t")
    arguments = done.stdout.splitlines()
    assert done.returncode == 0
    assert arguments[0] == "server"
    assert arguments[arguments.index("--allowed-hosts") + 1] == "localhost:5000,127.0.0.1:5000"
    assert "basic-auth" not in arguments
    assert "s3cr3t" not in done.stdout + done.stderr


def test_composes_mlflow_is_at_no_other_address_without_a_login(tmp_path: Path) -> None:
    refused = start_mlflow(tmp_path, PUBLISH="0.0.0.0", ALLOWED_HOSTS="host:5000")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "set MLFLOW_ADMIN_PASSWORD, or leave PUBLISH out\n"
    login = {"MLFLOW_ADMIN_PASSWORD": "long and secret", "MLFLOW_SECRET_KEY": "another"}
    done = start_mlflow(tmp_path, PUBLISH="0.0.0.0", ALLOWED_HOSTS="host:5000", **login)
    assert done.stdout.splitlines()[:3] == ["server", "--app-name", "basic-auth"]
    config = configparser.ConfigParser()
    config.read(tmp_path / "auth.ini")
    assert dict(config["mlflow"]) == {
        "default_permission": "READ",
        "database_uri": "postgresql+psycopg2://mlflow@postgres/mlflow",
    }


@pytest.mark.parametrize("path", [*MANIFESTS, INFRA / "Dockerfile"], ids=lambda path: path.name)
def test_each_begins_with_its_command_and_what_to_set(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert re.search(r"^#   (docker|kubectl|ray|helm|export|python)", head, re.MULTILINE)
    assert "# Set: " in head


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert not re.search(
        r"AKIA[0-9A-Z]{12}|BEGIN [A-Z ]*PRIVATE KEY|(?i:password|token): [A-Za-z0-9]{12,}", text
    )


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_linter_finds_nothing_in_the_image_build() -> None:
    done = subprocess.run(["hadolint", INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
