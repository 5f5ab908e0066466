"""A search over params.

Ray Tune runs the trials, Optuna proposes their values, and successive halving ends weak trials early.
"""

from __future__ import annotations

import math
import os
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import fsspec

from pipelines.metrics import rising
from pipelines.params import SearchParams, TrainingParams
from pipelines.search.records import SETTLED, Trial, read_trial, read_trials, settle_trial, trial_directory
from pipelines.storage import files
from pipelines.storage.lease import Lease, check_held, held
from pipelines.training import pareto
from pipelines.training.job import EpochRecord, TrainingError
from pipelines.training.launch import cluster, is_final

# Read by Ray Tune; the user's own settings win.
_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints at verbosity 0 too
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # trials run in the working directory of the stage
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # some metrics are only measured at the end of a trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search; another start resumes it
}


class Work(Protocol):
    """The function of a trial. Picklable."""

    def __call__(
        self, values: dict[str, Any], directory: str, on_epoch: Callable[[EpochRecord], None], sharing: int
    ) -> Mapping[str, float]:
        """Trains with `values`, from the checkpoints in `directory` if there are any; returns the metrics.

        Args:
            values: key of the params -> value.
            directory: directory of the trial.
            on_epoch: called with the record of each epoch if the trial trains in its own process.
            sharing: number of trials that share the machine.
        """
        ...


def search(
    work: Work,
    params: SearchParams,
    training: TrainingParams,
    directory: str,
    *,
    first: Sequence[dict[str, Any]] = (),
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Runs the trials that `directory` does not have yet; returns all records in the order of their start.

    Trials that were running when the search was killed resume from their checkpoints. Settled trials are not
    run again; their records are passed to Optuna and successive halving in the order of their start.

    Args:
        work: function of a trial.
        params: params of the search.
        training: resources of a trial, and `max_failures`, its restarts.
        directory: directory of the search, see `run_directory`. It is the same for the same space, metrics
            and inputs.
        first: values of the first trials.
        on_trial: called in this process with the record of each trial that is over, also of settled ones.

    Raises:
        TrainingError: no trial was finished, or Ray Tune lost some.
        LeaseError: another driver is searching in `directory`.
    """
    known = read_trials(directory)
    left = params.trials - sum(trial["status"] in SETTLED for trial in known)
    if left <= 0:
        # Enough trials are settled, so those that a kill has interrupted are not resumed.
        found = [trial for trial in known if trial["status"] != "running"]
        for trial in found:
            on_trial(trial)
    else:
        before = [trial["values"] for trial in known]
        queue = [*before, *(values for values in first if values not in before)][
            : max(params.trials, len(before))
        ]
        with held(directory) as lease, cluster(_together(params, training)):
            _tune(work, params, training, directory, queue, on_trial, lease)
        found = read_trials(directory)
    for trial in found:
        if trial["status"] in SETTLED:
            check_held(directory)
            files.remove(f"{trial_directory(directory, trial['values'])}/checkpoints")
    lost = sum(trial["status"] == "running" for trial in found)
    if lost:
        raise TrainingError(
            f"Ray Tune lost {lost} trials of the search; what is finished is kept: start it again to go on"
        )
    if all(trial["status"] != "finished" for trial in found):
        raise TrainingError(
            f"no trial of the search was finished; {found[0]['error'] if found else 'none was started'}"
        )
    return found


def _together(params: SearchParams, training: TrainingParams) -> TrainingParams:
    """Returns `training` with the number of workers of all concurrent trials together."""
    return training.model_copy(update={"workers": max(1, params.workers) * params.concurrency})


def _tune(
    work: Work,
    params: SearchParams,
    training: TrainingParams,
    directory: str,
    queue: list[dict[str, Any]],
    on_trial: Callable[[Trial], None],
    lease: Lease,
) -> None:
    """Does the work of `search` under its lease of `directory`; Ray is initialised."""
    for variable, value in _TUNE_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import pyarrow.fs
    from ray import tune

    from pipelines.search.proposals import Suggestions

    own: dict[str, float] = {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker}
    if params.workers > 0:
        # The trial's Ray Train workers take the cores, so the trial itself requests none. It requests 1 byte
        # of memory, because Ray refuses an empty request.
        own = {"memory": 1.0}
    function = partial(
        _trial, work=work, metric=params.metrics[0], directory=directory, place=os.getcwd(), lease=lease
    )
    storage, name = f"{directory}/ray", uuid.uuid4().hex
    filesystem, root = fsspec.core.url_to_fs(storage)
    tuner = tune.Tuner(
        tune.with_resources(partial(function, sharing=params.concurrency), own),
        tune_config=tune.TuneConfig(
            search_alg=Suggestions(params, directory, queue, on_trial),
            scheduler=_halving(params),
            num_samples=max(params.trials, len(queue)),
            max_concurrent_trials=params.concurrency,
            reuse_actors=True,  # each new process would import torch again
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)),
            failure_config=tune.FailureConfig(max_failures=training.max_failures),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        files.remove(f"{storage}/{name}")


def _halving(params: SearchParams) -> Any:
    """Returns Ray Tune's scheduler. If `asha` is set, it ends weak trials early by the first metric."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    from pipelines.search.proposals import mode_of

    last, asha = params.epochs - 1, params.asha  # to stop a trial after its last epoch would save nothing
    if asha is None or asha.grace > last:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        metric=params.metrics[0],
        mode=mode_of(params.metrics[0]),
        max_t=last,
        grace_period=asha.grace,
        reduction_factor=asha.reduction,
        stop_last_trials=False,
    )


def _trial(
    config: dict[str, Any], *, work: Work, metric: str, directory: str, place: str, sharing: int, lease: Lease
) -> None:
    """Runs a trial in a process of Ray Tune.

    A trial ends only after its record is written, so what the record says holds after a kill at any time.
    """
    from ray import tune

    # A stopped trial gives its process to the next trial when its current step ends. Ray Tune waits 2 s for
    # this by default, and if the step takes longer the search stalls.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")
    if os.path.isdir(place):
        os.chdir(place)
    here = trial_directory(directory, config)
    trial = read_trial(here)

    def report(record: EpochRecord) -> None:
        if metric in record["metrics"]:
            tune.report({"epoch": record["epoch"], metric: record["metrics"][metric]})

    if trial["status"] in SETTLED:
        for record in trial["history"]:
            report(record)
        return
    with held(here, under=lease):
        try:
            found = work(config, here, report, sharing)
        except Exception as error:
            known = isinstance(error, TrainingError | ValueError)
            if not is_final(error):
                raise  # Ray Tune starts the trial again
            if not known:
                traceback.print_exc()
            settle_trial(
                here, trial, "failed", error=str(error) if known else f"{type(error).__name__}: {error}"
            )
            return
        settle_trial(here, trial, "finished", found)
        files.remove(f"{here}/checkpoints")


def front(found: Sequence[Trial], metrics: Sequence[str]) -> list[int]:
    """Returns the indices of the Pareto-optimal finished trials, best first.

    A trial that has not measured a metric is worse in it than all that have. Such a trial is on the front
    only by its other metrics.
    """
    finished = [number for number, trial in enumerate(found) if trial["status"] == "finished"]
    points = [_point(found[number], metrics) for number in finished]
    best = pareto.front(points, width=1e-9)  # practically without bins
    return [finished[index] for index in sorted(best, key=points.__getitem__, reverse=True)]


def _point(trial: Trial, metrics: Sequence[str]) -> tuple[float, ...]:
    """Returns the trial's metrics, negated if lower is better; -inf for those that were not measured."""
    known = trial["metrics"]
    return tuple(rising(name, known[name]) if name in known else -math.inf for name in metrics)
