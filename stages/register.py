"""Stage `register`: puts the B-cosified model and its evidence into the model registry. Idempotent."""

from pathlib import Path

from pipelines import tracking
from pipelines.data.shards.manifest import read_manifest
from pipelines.directions import higher_is_better
from pipelines.storage.files import required_json, write_json
from pipelines.workflow.places import BCOS_NAMES, REPORTS, shards_of
from pipelines.workflow.reports import flat
from pipelines.workflow.running import stage


def main() -> None:
    """Registers `models/bcosify/<first start>` with the metrics and pictures of `reports/evaluate`.

    The version becomes the candidate if it passes its gates and is not worse than the present candidate, by
    the validation metric that selected its epoch.
    """
    with stage() as params:
        start = params.bcosify.starts[0]
        metrics = required_json(REPORTS / "evaluate/metrics.json")["models"][BCOS_NAMES[start]]
        best = required_json(REPORTS / "bcosify" / start / "metrics.json")
        select = getattr(params.bcosify, start).select
        gates = required_json(REPORTS / "gates.json")
        version = tracking.register(
            Path("models/bcosify", start),
            experiment=params.tracking.experiment,
            name=params.tracking.model_name,
            alias=params.tracking.alias,
            metrics=flat({"test": metrics}) | {key: value for key, value in best.items() if key == select},
            manifest=read_manifest(shards_of(params.dataset)).to_json(),
            dataset=params.dataset,
            gates=(gates["outcome"], gates["gates"]) if gates["gates"] else None,
            pictures=sorted((REPORTS / "evaluate/pictures").iterdir()),
            params=params.model_dump(mode="json"),
            compare=select,
            higher_is_better=higher_is_better(select) is not False,
        )
        write_json(
            REPORTS / "register.json",
            {"uri": version.uri, "version": version.version, "digest": version.digest},
        )


if __name__ == "__main__":
    main()
