"""Runs a function in this process or on Ray Train workers; the only place where Ray is used to train."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import torch

import pipelines
from pipelines.distributed import Context, use_threads
from pipelines.params import TrainingParams
from pipelines.process import OPENMP, cpu_count, environment
from pipelines.storage import files
from pipelines.storage.errors import one_line
from pipelines.storage.lease import LeaseError, held
from pipelines.storage.paths import absolute
from pipelines.training import checkpoints
from pipelines.training.job import Job, Result, TrainingError, best_record, check_measured, is_finished, kept_records
from pipelines.training.loop import fit, report

# Errors that a restarted worker would meet again: bad data, bad params, bugs. All others (a lost worker, a storage
# that fails for a while) are worth a restart.
FINAL = (TrainingError, LeaseError, ValueError, TypeError, LookupError, AttributeError, ImportError)
# Read by Ray when it is imported or starts workers; the user's own settings win.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end or a death is noticed
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # a line is printed once
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP warns of `find_unused_parameters`, which is meant (see `distributed.wrap`)
    **OPENMP,  # workers import torch before this project
}
# Seconds that workers may wait for their nodes before Ray looks again which nodes there are. After a loss it first asks for
# as many as before, and would let elastic workers wait in vain; a fixed number can but wait, and each look is a traceback.
_START_TIMEOUT, _FIXED_WAIT, _ELASTIC_WAIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300", "30"
_WATCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_OBJECT_STORE = 256 * 2**20  # bytes; training moves no tensors through Ray


def train(job: Job, sharing: int = 1) -> Result:
    """Trains `job` to its end, from where its directory says it is; a finished run returns at once. `sharing`: see `launch`.

    Raises:
        TrainingError: training cannot go on; one line that names the cause and the checkpoint that is kept.
        LeaseError: another driver is training in the same directory.
    """
    check_batch_size(job.optim.batch_size, job.training)
    with held(job.directory) as lease:
        summary = checkpoints.newest(job.directory)
        if summary is not None and is_finished(summary["history"], job.optim, summary.get("directions")):
            history = summary["history"]
            files.write_json(f"{job.directory}/history.json", history)  # a kill may have come before the last epoch's
            report(job, history)
        else:
            job = replace(job, owner=lease.owner)
            history = launch(fit, job, training=job.training, storage=job.directory, sharing=sharing)
            summary = checkpoints.newest(job.directory)
    known = (summary or {}).get("directions")
    check_measured(history, job.optim)
    return Result(job.directory, history, best_record(history, job.optim, known), kept_records(history, job.optim, known))


def check_batch_size(batch_size: int, training: TrainingParams) -> None:
    """Raises `TrainingError` unless every allowed number of workers can share the effective batch equally, in equal parts."""
    workers, parts, most = training.workers, training.accumulate, training.most_workers
    least = most if isinstance(workers, int) else workers[0]
    bad = [str(count) for count in range(least, most + 1) if batch_size % (count * (parts if count == most else 1))]
    if bad:
        in_parts = f", each of which takes {parts} parts (training.accumulate)" if parts > 1 else ""
        raise TrainingError(
            f"batch_size {batch_size} (over all workers) cannot be shared equally by {', '.join(bad)} of the "
            f"workers {workers}{in_parts}: choose a multiple of every number of workers that may occur"
            + (" times the parts" if parts > 1 else "")
        )


def launch(fn: Callable[..., Any], *args: Any, training: TrainingParams, storage: str, sharing: int = 1) -> Any:
    """What `fn(context, *args)` returns on rank 0, run as `training` says: in this process or on Ray workers.

    Args:
        fn: a module-level function; what it returns is made of plain Python values, without tensors.
        args: picklable values.
        training: `workers` and resources are used. Workers that die are replaced `max_failures` times.
        storage: folder or fsspec URL where Ray keeps its state for the time being, seen by all workers.
        sharing: processes like this one that share the machine's cores, where `fn` runs in this process.

    Raises:
        TrainingError: on Ray workers, for an error that a restart would not cure, or after the last restart. In this
            process the error itself is raised.
    """
    if training.workers == 0:
        use_threads(sharing)
        return fn(Context(device=_device(training)), *args)
    with cluster(training):
        return _launch_on_ray(fn, args, training, f"{absolute(storage)}/ray")


def _device(training: TrainingParams) -> torch.device:
    """The device that the params ask for."""
    if training.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError(f"gpus_per_worker: {training.gpus_per_worker:g} is asked for, but torch finds no GPU here")
    return torch.device("cuda")


def _launch_on_ray(fn: Callable[..., Any], args: tuple[Any, ...], training: TrainingParams, storage: str) -> Any:
    """`launch` on Ray Train workers, on the Ray that is initialised."""
    import pyarrow.fs
    from ray import cloudpickle
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    name = uuid.uuid4().hex  # a used name would bring back its old state
    filesystem, root = fsspec.core.url_to_fs(storage)
    gpus = training.gpus_per_worker
    config = {
        "call": cloudpickle.dumps((fn, args)),  # opened by the workers alone: Ray's controller need not import it
        "failure": f"{storage}/{name}",
        "gpus": gpus,
        "watch": os.environ.get(_WATCH) != "0",
    }
    trainer = TorchTrainer(
        _work,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=training.workers,  # type: ignore[arg-type]
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
            elastic_resize_monitor_interval_s=training.resize_every,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)),
            failure_config=FailureConfig(max_failures=training.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )
    value, lost = None, ""
    try:
        wait = _FIXED_WAIT if isinstance(training.workers, int) else _ELASTIC_WAIT
        with environment(_START_TIMEOUT, os.environ.get(_START_TIMEOUT, wait)):
            value = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        last = str(error).strip().splitlines()[-1]
        lost = f"the workers failed more than {training.max_failures} times: {last}"
    final = files.read_json(f"{config['failure']}/failure.json")
    files.remove(config["failure"])
    if final or lost:
        raise TrainingError(final or lost)
    return value


def _work(config: dict[str, Any]) -> Any:
    """What each Ray worker runs.

    A final error is written down and the worker fails; where Ray starts the group again, that one sees it and ends.
    """
    import ray.train
    import ray.train.torch
    from ray import cloudpickle

    context = ray.train.get_context()
    use_threads(context.get_local_world_size())
    if context.get_world_rank() == 0:
        _show_log()
    if files.read_json(f"{config['failure']}/failure.json") is not None:
        return None
    device = ray.train.torch.get_device() if config["gpus"] else torch.device("cpu")
    here = Context(
        context.get_world_rank(),
        context.get_world_size(),
        device,
        report=ray.train.report,
        preempted=(lambda: ray.train.get_preemption_info() is not None) if config["watch"] else None,
    )
    try:
        fn, args = cloudpickle.loads(config["call"])
        return fn(here, *args)
    except FINAL as error:
        known = isinstance(error, TrainingError | LeaseError | ValueError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        if not known:
            traceback.print_exc()
        files.write_json(f"{config['failure']}/failure.json", message)
        if here.world_size == 1:
            return None
        raise


def _show_log() -> None:
    """Lets this project's log lines out of a Ray worker, whose root logger keeps to errors."""
    log = logging.getLogger("pipelines")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]


@contextmanager
def cluster(training: TrainingParams) -> Iterator[None]:
    """A Ray that is initialised: the caller's, the one that RAY_ADDRESS names, or one of our own for the time being.

    `launch` enters it by itself; around several launches it saves the start of each.
    """
    for variable, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        _connect(os.environ["RAY_ADDRESS"])
    else:
        _start_local(training)
    try:
        _check_gpus(training)
        yield
    finally:
        ray.shutdown()


def ray_environment() -> dict[str, str]:
    """RAY_ENVIRONMENT, with the user's own settings."""
    return {name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()}


def _connect(address: str) -> None:
    """Joins a cluster, whose workers get this code; those of a submitted job have it."""
    import ray
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR as SUBMITTED

    if address.startswith("http"):
        raise TrainingError(f"RAY_ADDRESS is {address}, a job server: python -m infra.submit STAGE --address {address}")
    host, _, port = address.rpartition("/")[2].rpartition(":")
    code = str(Path(pipelines.__file__).parent)
    workers_have = None if SUBMITTED in os.environ else {"py_modules": [code], "env_vars": ray_environment()}
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would wait for minutes
        ray.init(logging_level=logging.WARNING, runtime_env=workers_have)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise TrainingError(f"no Ray cluster at RAY_ADDRESS {address}: {one_line(error)}") from None


def _check_gpus(training: TrainingParams) -> None:
    """Raises `TrainingError` where the GPUs that the least number of workers needs cannot come."""
    import ray

    least = training.workers if isinstance(training.workers, int) else training.workers[0]
    wanted = least * training.gpus_per_worker
    has = ray.cluster_resources()
    if wanted > has.get("GPU", 0) and not _autoscales():
        found = f"{has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs"
        raise TrainingError(f"gpus_per_worker: {least} workers need {wanted:g} GPUs; there are at most {found}")


def _autoscales() -> bool:
    """Whether the Ray that is initialised may get more nodes by itself.

    A cluster of this process alone has no autoscaler. Of others the first kind of autoscaler says which type each node is, for
    nodes started by hand one of its own; where nothing is said, there is the second kind.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    if not os.environ.get("RAY_ADDRESS"):
        return False
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    return is_autoscaled(status.get("autoscaler_report", {}).get("node_type_mapping"))


def is_autoscaled(types: Mapping[str, str] | None) -> bool:
    """Whether the nodes of a cluster, address -> type, come from an autoscaler, as far as is known."""
    return not types or any(type_ != f"node_{node}" for node, type_ in types.items())


def _start_local(training: TrainingParams) -> None:
    """Starts Ray on this machine, with as many logical CPUs as the workers ask for."""
    import ray

    # There is no preemption here to watch for. Without a dashboard one of Ray Train's helpers warns each second: all of
    # Ray's processes keep to errors, and this process's own logging is left as it was.
    os.environ.setdefault(_WATCH, "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    wanted = int(-(-training.most_workers * training.cpus_per_worker // 1))
    ray.init(
        address="local",
        num_cpus=max(cpu_count(), wanted),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE,
        logging_level=logging.ERROR,
        logging_config=ray.LoggingConfig(log_level="ERROR"),
    )
    root.setLevel(level)
    root.handlers[:] = handlers
