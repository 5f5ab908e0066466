"""Runs a function in this process or on Ray Train workers; the only place where Ray is used to train."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import torch

import pipelines
from pipelines.distributed import Context, use_threads
from pipelines.params import TrainingParams
from pipelines.process import OPENMP, SOCKET_NAME, cpu_count, environment, short_folder
from pipelines.storage import files
from pipelines.storage.errors import one_line
from pipelines.storage.lease import LeaseError, held
from pipelines.storage.paths import absolute
from pipelines.training import checkpoints
from pipelines.training.job import (
    Job,
    Result,
    TrainingError,
    best_record,
    check_measured,
    is_finished,
    kept_records,
)
from pipelines.training.loop import fit, report
from pipelines.training.preflight import check, check_batch_size

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.failure_handling import FailurePolicy

# Errors that a restarted worker would meet again: bad data, bad params, bugs. Other errors, such as a lost
# worker or a storage that fails for a while, may be cured by a restart.
FINAL = (
    *(TrainingError, LeaseError, ValueError, TypeError, LookupError, AttributeError, ImportError),
    *(AssertionError, ArithmeticError, NotImplementedError, RecursionError),
)
# Matches messages of torch for tensors that do not fit together. Their type is RuntimeError, as for all else.
_SHAPES = re.compile(r"\b(shapes?|sizes?|dimensions?|channels|dtype|scalar type|state_dict)\b")
# Read by Ray when it is imported or starts workers; the user's own settings win.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # seconds until the end or death of a worker is noticed
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise lines are printed twice
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # DDP warns of `find_unused_parameters`, which `distributed.wrap` sets on purpose.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    **OPENMP,  # `process` would set these too late, because workers import torch before this project
}
# Seconds that Ray waits for the nodes of a worker group before it looks again which nodes there are. After a
# loss Ray first asks for as many workers as before. Elastic workers would wait for them in vain, so their
# limit is short. A fixed number of workers has to wait, and each look prints a traceback, so its limit is
# long.
_START_TIMEOUT, _FIXED_WAIT, _ELASTIC_WAIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300", "30"
_WATCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# Ray Train's helpers find their cluster by these variables. Without them they look for any cluster on this
# machine, and stop if it has two.
_OWN_ADDRESS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# The longest path that Ray appends to its folder.
_LONGEST_SESSION = "/session_2000-12-31_23-59-59_123456_1234567/sockets/plasma_store"
_OBJECT_STORE = 256 * 2**20  # bytes; training moves no tensors through Ray


def train(job: Job, sharing: int = 1) -> Result:
    """Trains `job` to its end from its newest checkpoint; a finished run is returned at once.

    Args:
        job: the run.
        sharing: see `launch`.

    Raises:
        TrainingError: training cannot go on. The message, one line, names the cause and the checkpoint that
            is kept.
        LeaseError: another driver is training in the same directory.
        UserError: see `check`.
    """
    check_batch_size(job.optim.batch_size, job.training)
    with held(job.directory) as lease:
        summary = checkpoints.newest(job.directory)
        if summary is not None and is_finished(summary["history"], job.params, summary.get("directions")):
            history = summary["history"]
            # The run may have been killed between its last checkpoint and its history.
            files.write_json(f"{job.directory}/history.json", history)
            report(job, history)
        else:
            if job.training.workers != 0:  # fail before Ray is started; in this process `fit` fails as early
                check(job)
            job = replace(job, owner=lease.owner)
            history = launch(fit, job, training=job.training, storage=job.directory, sharing=sharing)
            summary = checkpoints.newest(job.directory)
    known = (summary or {}).get("directions")
    check_measured(history, job.params)
    return Result(
        job.directory,
        history,
        best_record(history, job.params, known),
        kept_records(history, job.params, known),
    )


def is_final(error: Exception) -> bool:
    """Returns True if a restarted worker would meet the error again."""
    plain = type(error) is RuntimeError and "gloo" not in str(error)
    return isinstance(error, FINAL) or (plain and _SHAPES.search(str(error)) is not None)


def launch(
    fn: Callable[..., Any], *args: Any, training: TrainingParams, storage: str, sharing: int = 1
) -> Any:
    """Runs `fn(context, *args)` in this process or on Ray workers; returns rank 0's result.

    Args:
        fn: a module-level function that returns plain Python values, no tensors.
        args: picklable values.
        training: `workers` and resources are used. A worker group is restarted at most `max_failures` times
            between two checkpoints in `storage`.
        storage: folder or fsspec URL that all workers can reach. Ray keeps its state there during the run.
        sharing: number of processes, this one included, that share the machine's cores. Used if `workers` is
            0.

    Raises:
        TrainingError: on Ray workers, if a restart would not cure the error, or after the last restart. In
            this process the error itself is raised.
    """
    if training.workers == 0:
        use_threads(sharing)
        return fn(Context(device=_device(training)), *args)
    with cluster(training):
        return _launch_on_ray(fn, args, training, absolute(storage))


def _device(training: TrainingParams) -> torch.device:
    """Returns the device that the params ask for; raises `TrainingError` if that GPU is missing."""
    if training.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError(
            f"gpus_per_worker: {training.gpus_per_worker:g} is asked for, but torch finds no GPU here"
        )
    return torch.device("cuda")


def _launch_on_ray(
    fn: Callable[..., Any], args: tuple[Any, ...], training: TrainingParams, directory: str
) -> Any:
    """Does the work of `launch` on Ray Train workers; Ray is initialised."""
    import pyarrow.fs
    from ray import cloudpickle, get_runtime_context
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
    from ray.train.v2.api.exceptions import TrainingFailedError

    class Trainer(TorchTrainer):
        """Ray's trainer with our failure policy, for which Ray has no public argument."""

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            policy = _failure_policy(self.run_config.failure_config, directory)
            return super()._initialize_and_run_controller(**arguments | {"failure_policy": policy})  # type: ignore[misc]

    name = uuid.uuid4().hex  # for a name that was used before, Ray would restore its old state
    storage = f"{directory}/ray"
    filesystem, root = fsspec.core.url_to_fs(storage)
    gpus = training.gpus_per_worker
    config = {
        # Only the workers unpickle the call, so that Ray's controller need not import what it needs.
        "call": cloudpickle.dumps((fn, args)),
        "failure": f"{storage}/{name}",
        "gpus": gpus,
        "watch": os.environ.get(_WATCH) != "0",
    }
    trainer = Trainer(
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
        ENV_VARS_TO_PROPAGATE.update(_OWN_ADDRESS)
        with ExitStack() as meanwhile:
            meanwhile.enter_context(environment(_START_TIMEOUT, os.environ.get(_START_TIMEOUT, wait)))
            for variable in _OWN_ADDRESS:
                meanwhile.enter_context(environment(variable, get_runtime_context().gcs_address))
            value = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        last = str(error).strip().splitlines()[-1]
        lost = f"the workers failed more than {training.max_failures} times without a new checkpoint: {last}"
    final = files.read_json(f"{config['failure']}/failure.json")
    files.remove(config["failure"])
    if final or lost:
        raise TrainingError(final or lost)
    return value


def _failure_policy(config: Any, directory: str) -> FailurePolicy:
    """Returns Ray's default policy, with its count of failures reset at each checkpoint in `directory`."""
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy

    # A local class is pickled by value, so Ray's controller need not import this module, and torch with it.
    class BetweenCheckpoints(DefaultFailurePolicy):
        def __init__(self) -> None:
            super().__init__(config)
            self._known: list[str] = []

        def make_decision(self, training_failed_error: Any) -> Any:
            try:
                filesystem, path = files.file_system(directory)
                found = sorted(filesystem.glob(f"{path}/checkpoints/*/complete.json"))
            except Exception:  # the storage does not answer, which the workers report
                found = self._known
            if found != self._known:
                self._known, self._worker_group_failures = found, 0
            return super().make_decision(training_failed_error)

    return BetweenCheckpoints()


def _work(config: dict[str, Any]) -> Any:
    """Runs the function of `launch` on one Ray worker; returns its result.

    An error that no restart would cure is written to `failure.json`. The worker then fails, or returns `None`
    if it is the only one. If Ray restarts the group, the new workers find the file and return `None` at once.
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
    except Exception as error:
        if not is_final(error):
            raise
        known = isinstance(error, TrainingError | LeaseError | ValueError)
        message = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
        if not known:
            traceback.print_exc()
        files.write_json(f"{config['failure']}/failure.json", message)
        if here.world_size == 1:
            return None
        raise


def _show_log() -> None:
    """Prints this project's log lines in a Ray worker, whose root logger prints errors only."""
    log = logging.getLogger("pipelines")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]


@contextmanager
def cluster(training: TrainingParams) -> Iterator[None]:
    """Provides an initialised Ray in the block.

    Uses the caller's Ray if there is one, else the cluster that RAY_ADDRESS names, else a new Ray on this
    machine for the time of the block. `launch` enters `cluster` itself; entered around several launches it
    starts Ray only once.
    """
    for variable, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import ray

    if ray.is_initialized():
        yield
        return
    with ExitStack() as ends:
        if os.environ.get("RAY_ADDRESS"):
            _connect(os.environ["RAY_ADDRESS"])
        else:
            _start_local(training, folder=ends.enter_context(_ray_folder()))
        ends.callback(ray.shutdown)
        _check_gpus(training)
        _check_cpus(training)
        yield


def ray_environment() -> dict[str, str]:
    """Returns RAY_ENVIRONMENT, overridden by the variables that the user has set."""
    return {name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()}


def _connect(address: str) -> None:
    """Connects to the cluster at `address` and sends this package to its workers.

    The workers of a submitted job have the package already.
    """
    import ray
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR as SUBMITTED

    if address.startswith("http"):
        raise TrainingError(
            f"RAY_ADDRESS is {address}, a job server: python -m infra.submit STAGE --address {address}"
        )
    host, _, port = address.rpartition("/")[2].rpartition(":")
    code = str(Path(pipelines.__file__).parent)
    workers_have = None if SUBMITTED in os.environ else {"py_modules": [code], "env_vars": ray_environment()}
    try:
        if port.isdecimal():
            # Without this check Ray would wait for an unreachable cluster for minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(logging_level=logging.WARNING, runtime_env=workers_have)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise TrainingError(f"no Ray cluster at RAY_ADDRESS {address}: {one_line(error)}") from None


def _check_gpus(training: TrainingParams) -> None:
    """Raises `TrainingError` if the least number of workers needs more GPUs than there can be."""
    import ray

    least, has = training.least_workers, ray.cluster_resources()
    wanted = least * training.gpus_per_worker
    if wanted > has.get("GPU", 0) and not _autoscales():
        found = f"{has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs"
        raise TrainingError(
            f"gpus_per_worker: {least} workers need {wanted:g} GPUs; there are at most {found}"
        )


def _check_cpus(training: TrainingParams) -> None:
    """Raises `TrainingError` if no node has the CPUs of one worker, and no such node can be added."""
    import ray

    wanted = training.cpus_per_worker
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if wanted > largest > 0 and not _autoscales():
        raise TrainingError(
            f"cpus_per_worker: a worker with its loader's processes needs a node of {wanted:g} CPUs; "
            f"the largest has {largest:g}"
        )


def _autoscales() -> bool:
    """Returns True if the initialised Ray may add nodes by itself.

    A Ray that this process has started has no autoscaler. In other clusters the autoscaler of version 1
    reports a type for each node, see `is_autoscaled`. Without such a report the autoscaler may be of version
    2.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    if not os.environ.get("RAY_ADDRESS"):
        return False
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    return is_autoscaled(status.get("autoscaler_report", {}).get("node_type_mapping"))


def is_autoscaled(types: Mapping[str, str] | None) -> bool:
    """Returns True if an autoscaler has started some of the nodes, or if this is unknown.

    `types` maps a node's address to its type, which is `node_<address>` for nodes that were started by hand.
    """
    return not types or any(type_ != f"node_{node}" for node, type_ in types.items())


@contextmanager
def _ray_folder() -> Iterator[str | None]:
    """Yields a short folder for Ray if its default path is too long for Unix sockets, else `None`.

    Raises:
        TrainingError: there is no shorter folder.
    """
    named = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if named is None or len(os.fsencode(f"{os.environ[named]}/ray{_LONGEST_SESSION}")) <= SOCKET_NAME:
        yield None
        return
    if short_folder() is None:
        most = SOCKET_NAME - len(f"/ray{_LONGEST_SESSION}")
        raise TrainingError(
            f"{named} is too long for Ray's sockets: RAY_TMPDIR must be a folder of at most {most} characters"
        )
    with tempfile.TemporaryDirectory(prefix="ray-", dir=short_folder(), ignore_cleanup_errors=True) as folder:
        yield folder


def _start_local(training: TrainingParams, folder: str | None) -> None:
    """Starts Ray on this machine, with at least as many logical CPUs as the workers ask for.

    Ray keeps its session in `folder`, or in its default folder if that is `None`.
    """
    import ray

    # This machine is not preempted, so the watcher is off. Without a dashboard a helper of Ray Train warns
    # each second, so all processes of Ray log errors only. The logging of this process is restored
    # afterwards.
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
        _temp_dir=folder,
    )
    root.setLevel(level)
    root.handlers[:] = handlers
