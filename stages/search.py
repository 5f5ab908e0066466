"""Stage `search`: runs a training stage many times with different params; see `reports/search`."""

from functools import partial
from pathlib import Path

from pipelines.params import check_space
from pipelines.search.records import values_of_params
from pipelines.search.tune import search
from pipelines.workflow.identity import of_search
from pipelines.workflow.places import STORED_EXPLANATIONS, shards_of
from pipelines.workflow.running import stage
from pipelines.workflow.submitted_job import inputs_for_all
from pipelines.workflow.training import tracked
from pipelines.workflow.trials import (
    CODE,
    report_search,
    run_trial,
    task_of,
    track_trial,
    with_measurable_metrics,
)


def main() -> None:
    """Runs the trials that are not on record yet, and reports the Pareto front of all."""
    with stage() as params:
        check_space(params, "params.yaml: search.space")
        task = task_of(params, {})
        searched = with_measurable_metrics(params, task)
        folders = (Path(shards_of(task.params.dataset)), *task.upstream, STORED_EXPLANATIONS)
        settings = of_search(params, task)
        with tracked(task.params, "search", *settings, upstream=task.upstream, code=CODE) as (run, directory):
            work = partial(run_trial, searched, inputs_for_all(params.storage.root, folders))
            first, on_trial = values_of_params(params), partial(track_trial, searched, run, directory)
            start = [] if first is None else [first]
            training = params.training.with_loader(task.params.data.loader_workers)
            found = search(work, searched.search, training, directory, first=start, on_trial=on_trial)
            report_search(run, found, searched.search.metrics)


if __name__ == "__main__":
    main()
