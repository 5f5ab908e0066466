"""`python -m infra.submit STAGE [KEY=VALUE ...]`: runs a stage on a Ray cluster, fetches its outputs.

The code is sent as the job's working directory. Shards, models and checkpoints go through the storage.
Afterwards `dvc status` of the stage is clean. No credentials are sent, because the cluster has its own.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from infra import project
from infra.package import pack
from infra.project import PARAMS, Stage, SubmitError
from infra.take import take
from pipelines.errors import UserError
from pipelines.params import Params, TrainingParams, replaced
from pipelines.storage import files
from pipelines.storage.errors import one_line
from pipelines.storage.publish import publish
from pipelines.storage.retry import retry
from pipelines.training.launch import is_autoscaled, ray_environment
from pipelines.workflow.checks import check_stage
from pipelines.workflow.submitted_job import Order, OrderedStage, input_upload, publish_input, write_order

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS = "RAY_API_SERVER_ADDRESS"
# Environment variables that are sent to the job. They hold no secrets.
SENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "MLFLOW_TRACKING_URI",
)
FROM_HERE = 15.0  # seconds for which the storage may fail; short, because a person waits
CONNECT, READY = 10.0, 60.0  # seconds to reach a cluster; until a cluster that has just started takes jobs
INTERRUPTED = 130
CODE = "code.zip"  # has one folder at its top, as Ray expects of a zip at a URL


def main(arguments: Sequence[str] | None = None) -> int:
    """Submits, follows or stops a job; returns its exit status."""
    options = parse(arguments)
    try:
        if options.take:
            return take(options.take)
        if options.prepare:
            return prepare_only(options)
        client = connect(options.address)
        if options.stop:
            return stop(client, options.stop)
        job = options.follow or submit(client, options)
        return follow(client, job) if options.wait else 0
    except (UserError, OSError) as error:
        print(f"infra.submit: {error}", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.submit", description=(__doc__ or "").partition(": ")[2]
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "stage", nargs="?", metavar="STAGE", help="such as pretrain, bcosify@pretrained, distill"
    )
    what.add_argument("--follow", metavar="ID", help="follow a job submitted before and bring its outputs")
    what.add_argument("--take", metavar="PLACE", help="bring the outputs of a job in the storage")
    what.add_argument("--stop", metavar="ID", help="stop a job; its checkpoints stay")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="params, as after `dvc exp run -S`")
    parser.add_argument("--address", help=f"job server, http://HEAD:8265; by default {ADDRESS}")
    parser.add_argument("--workers", type=workers, metavar="N|MIN:MAX", help="training.workers")
    parser.add_argument("--gpus-per-worker", type=float, metavar="N", help="training.gpus_per_worker")
    parser.add_argument(
        "--storage", metavar="URL", help="storage.root: checkpoints, shards, models; s3://bucket/folder"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="put all that a job needs to the storage, and submit none"
    )
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="follow the job to its end"
    )
    return parser.parse_args(arguments)


def workers(text: str) -> int | list[int]:
    """Parses `N` or `MIN:MAX` to the form of the param `training.workers`."""
    numbers = [int(part) for part in text.split(":")]
    if len(numbers) > 2 or min(numbers) < 1:
        raise ValueError(text)
    return numbers if len(numbers) == 2 else numbers[0]


def connect(address: str | None) -> JobSubmissionClient:
    """Returns a client of the job server.

    Raises:
        SubmitError: there is no address, no server answers there, or it refuses the token.
    """
    url = address or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS") or ""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SubmitError(
            f"--address or {ADDRESS}: the address of a job server is wanted, http://HEAD:8265, not {url!r}"
        )
    try:
        socket.create_connection(
            (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), CONNECT
        ).close()
    except OSError as error:
        raise SubmitError(f"no Ray cluster at {url}: {error}") from None
    os.environ[ADDRESS] = url  # because Ray prefers this variable to the argument
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in (
        "dashboard.modules.job.sdk",
        "dashboard.modules.dashboard_sdk",
        "_private.runtime_env.packaging",
    ):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        what = "wants a token" if "required" in str(error) else "refuses this token"
        raise SubmitError(
            f"the Ray cluster at {url} {what}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise SubmitError(f"no Ray cluster at {url}: {one_line(error)}") from None


def submit(client: JobSubmissionClient, options: argparse.Namespace) -> str:
    """Uploads a job's inputs, submits the job and returns its name."""
    with tempfile.TemporaryDirectory(prefix="submit-") as folder:
        code = Path(folder, "code")
        metadata = prepare(client, options, code)
        job = metadata["place"].rpartition("/")[2]
        send(
            client,
            entrypoint="python -m infra.job",
            submission_id=job,
            runtime_env={"working_dir": str(code), "env_vars": ray_environment() | sent()},
            metadata=metadata,
        )
    print(
        f"follow  python -m infra.submit --follow {job}\nstop    python -m infra.submit --stop {job}",
        flush=True,
    )
    return job


def prepare_only(options: argparse.Namespace) -> int:
    """Uploads a job's inputs and code without submitting it: an external scheduler starts the job."""
    with tempfile.TemporaryDirectory(prefix="submit-") as folder:
        place = prepare(None, options, Path(folder, "code"))["place"]
        shutil.make_archive(str(Path(folder, "code")), "zip", folder, "code")
        publish(folder, place, [CODE])
    print(f"prepared: {place}")
    return 0


def send(client: JobSubmissionClient, **job: Any) -> None:
    """Submits a job. A head that has just started gets `READY` seconds to take it."""
    end = time.monotonic() + READY
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "status code 5" not in str(error) or time.monotonic() > end:
                raise SubmitError(f"the cluster does not take the job: {one_line(error)}") from None
        time.sleep(2)


def prepare(client: JobSubmissionClient | None, options: argparse.Namespace, code: Path) -> dict[str, str]:
    """Checks the job for all errors that can be found here, then uploads its inputs. Returns its metadata.

    Args:
        client: client of the cluster, whose resources are checked; `None` skips that check.
        options: the parsed command line.
        code: path of a new folder, which becomes the working directory of the job, with its order.
    """
    changes = {} if options.workers is None else {"training.workers": options.workers}
    with project.params_set(options.overrides, changes) as params:
        gpus = params.training.gpus_per_worker if options.gpus_per_worker is None else options.gpus_per_worker
        storage = (options.storage or params.storage.root).rstrip("/")
        there = {"storage.root": storage, "training.gpus_per_worker": gpus}
        job = project.job_of(options.stage, uuid.uuid4().hex[:8])
        place = f"{storage}/jobs/{job}"
        chosen = project.stages(options.stage)
        check_workers(client, least_workers(options.stage, params), replaced(params, there).training)
        if "://" not in storage:
            raise SubmitError(
                f"storage.root is {storage!r}, a folder of this machine: say --storage s3://BUCKET/FOLDER"
            )
        commit, dirty = project.version()
        size = pack(code)
        for stage in chosen:
            check_sent(check_stage(stage.name, replaced(params, there)), code)
        uploads = [
            upload for path in needed(chosen, params) if (upload := input_upload(path, storage)) is not None
        ]
        for upload in uploads:
            upload.check()
        check_storage(storage, place)
        print(
            f"job {job}: {size / 2**20:.1f} MiB of code, "
            f"commit {commit[:10]}{' and changes' if dirty else ''}",
            flush=True,
        )
        inputs = [publish_input(upload) for upload in uploads]
    shutil.copy2(PARAMS, code)
    project.change(code / PARAMS, there)
    told = {"SUBMITTED_COMMIT": commit, "SUBMITTED_DIRTY": str(dirty).lower()}
    stages = [OrderedStage(stage.name, stage.command, stage.outputs, stage.state) for stage in chosen]
    write_order(code, Order(place, tuple(stages), tuple(inputs), told))
    lock = hashlib.sha256("".join(stage.state for stage in chosen).encode()).hexdigest()
    return {"stage": options.stage, "commit": commit, "dvc.lock": lock, "place": place}


def needed(chosen: Sequence[Stage], params: Params) -> list[str]:
    """Returns the sorted folders of earlier stages that the job needs."""
    paths = {path for stage in chosen for path in stage.inputs}
    if any(stage.name == "search" for stage in chosen):  # it may search `guide`
        paths |= {path for path in (f"data/shards/{params.guide.dataset}",) if Path(path).is_dir()}
    return sorted(paths)


def check_sent(paths: Sequence[Path], code: Path) -> None:
    """Raises `SubmitError` unless the job's working directory `code` has the files that its stages read."""
    for path in paths:
        if path.is_absolute() or not (code / path).exists():
            raise SubmitError(
                f"{path}: the job would not find it: of this machine's files those of the project go along "
                "that git does not ignore, by relative paths; or say a URL"
            )


def least_workers(stage: str, params: Params) -> int:
    """Returns the minimum number of a stage's workers; raises `SubmitError` if it would run without any."""
    if stage == "search":
        return params.search.concurrency * max(1, params.search.workers)
    least = (
        params.training.workers if isinstance(params.training.workers, int) else params.training.workers[0]
    )
    if least == 0:
        raise SubmitError("training.workers is 0, the stage's own process: say --workers N")
    return least


def check_workers(client: JobSubmissionClient | None, least: int, training: TrainingParams) -> None:
    """Raises `SubmitError` if the cluster has no room for `least` workers and cannot grow."""
    if client is None:
        return
    nodes = ask(client, "/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE&detail=1")[
        "result"
    ]["result"]
    each = {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker}
    if room_for([node["resources_total"] for node in nodes], each) < least and not autoscales(client):
        has = {kind: sum(node["resources_total"].get(kind, 0) for node in nodes) for kind in each}
        raise SubmitError(
            f"--workers, --gpus-per-worker: {least} workers need {least * each['GPU']:g} GPUs "
            f"and {least * each['CPU']:g} CPUs; "
            f"the cluster has {has['GPU']:g} GPUs and {has['CPU']:g} CPUs on {len(nodes)} nodes, "
            "and no autoscaler to add some"
        )


def room_for(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Returns how many workers fit on the nodes. A worker needs the resources `each`, all on one node."""
    wanted = {kind: amount for kind, amount in each.items() if amount > 0}
    return sum(
        min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in wanted.items()) for node in nodes
    )


def autoscales(client: JobSubmissionClient) -> bool:
    """Returns True if the cluster has an autoscaler that can add nodes."""
    status = ask(client, "/api/cluster_status")["clusterStatus"]
    return is_autoscaled(None if status is None else status["autoscalerReport"].get("nodeTypeMapping"))


def ask(client: JobSubmissionClient, path: str) -> Any:
    """Returns the data that the cluster's dashboard has at `path`."""
    response = client._do_request("GET", path)
    if response.status_code != 200:
        raise SubmitError(f"{client.get_address()}{path}: status {response.status_code}")
    return response.json()["data"]


def check_storage(storage: str, place: str) -> None:
    """Raises `SubmitError` unless this machine can write to the storage."""
    try:
        filesystem, root = files.file_system(place)
        files.make_folder(filesystem, root)
        retry(lambda: filesystem.pipe_file(f"{root}/submitted", b""), storage, FROM_HERE)
    except FileNotFoundError as error:
        raise SubmitError(f"{storage}: there is no such bucket ({one_line(error)})") from None
    except PermissionError as error:
        raise SubmitError(f"{storage}: these credentials may not write there ({one_line(error)})") from None
    except (ImportError, ValueError) as error:
        raise SubmitError(f"{storage}: {one_line(error)}") from None


def sent() -> dict[str, str]:
    """Returns the environment variables for the job: addresses, without local ones and those with a login."""
    values = {name: os.environ[name] for name in SENT if os.environ.get(name)}
    return {
        name: value
        for name, value in values.items()
        if "@" not in value and not value.startswith(("sqlite:", "file:"))
    }


def follow(client: JobSubmissionClient, job: str) -> int:
    """Prints a job's log to its end, then fetches its outputs; returns its exit status."""
    try:
        details = details_of(client, job)
        try:
            asyncio.run(show(client, job))
        except (OSError, RuntimeError) as error:
            print(f"the log broke off ({one_line(error)}); the job goes on, waiting for its end", flush=True)
        while not (details := details_of(client, job)).status.is_terminal():
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\nthe job goes on: python -m infra.submit --follow {job}, or --stop {job}", flush=True)
        return INTERRUPTED
    if details.status != "SUCCEEDED":
        print(f"job {job}: {details.status.lower()}", file=sys.stderr)
        return details.driver_exit_code or 1
    place = (details.metadata or {}).get("place", "")
    if not place.endswith(f"/jobs/{job}"):
        raise SubmitError(
            f"job {job} ended well and has no outputs for this project: infra.submit did not submit it"
        )
    return take(place)


def details_of(client: JobSubmissionClient, job: str) -> JobDetails:
    """Returns the cluster's record of a job; raises `SubmitError` if it has none."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        known = (
            ", ".join(str(each.submission_id) for each in client.list_jobs() if each.submission_id) or "none"
        )
        raise SubmitError(
            f"no job {job!r} on this cluster (it has {known})" if "404" in str(error) else str(error)
        ) from None


async def show(client: JobSubmissionClient, job: str) -> None:
    """Prints the log of a job while it is written, to its end."""
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def stop(client: JobSubmissionClient, job: str) -> int:
    """Asks the cluster to stop a job; returns 0."""
    details_of(client, job)
    print(f"job {job}: {'stopping' if client.stop_job(job) else 'had ended before'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
