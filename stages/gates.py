"""Stage `gates`: judges the network that is registered by the conditions in `gates`."""

from pipelines.evidence import Records
from pipelines.evidence.gates import judge, overall
from pipelines.storage.files import write_json
from pipelines.workflow.places import BCOS_NAMES, REPORTS
from pipelines.workflow.running import stage


def main() -> None:
    """Writes the outcome of each gate to `reports/gates.json`; the parent is the conventional network."""
    with stage() as params:
        places = {str(gate.split): REPORTS / "evaluate/records" / gate.split for gate in params.gates}
        records = {split: Records.load(place) for split, place in places.items()}
        names = (BCOS_NAMES[params.bcosify.starts[0]], "conventional")
        judged = [judge(gate, records, *names) for gate in params.gates]
        for each in judged:
            print(f"gate {each.gate.name}: {each.outcome}")
        outcome = overall(each.outcome for each in judged) if judged else None
        write_json(REPORTS / "gates.json", {"outcome": outcome, "gates": [each.to_json() for each in judged]})


if __name__ == "__main__":
    main()
