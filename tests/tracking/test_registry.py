import os
import shutil
import subprocess

import numpy as np
import pytest
import torch

from pipelines.bcos import add_inverse, contribution_map, dynamic_weights
from pipelines.models import ModelSpec, assemble, save
from pipelines.tracking import TrackingError, load, register, stage_run
from pipelines.tracking.server import connect
from tests.support.bare import bare_environment

NAME = "bcos-demo"
METRICS = {"val/accuracy": 0.5, "test/accuracy": 0.5, "test/gridpg": 0.25}
SPEC = ModelSpec("resnet20", ("cat", "dog", "owl"), 16, "bcos")


@pytest.fixture
def model(project):
    torch.manual_seed(0)
    module = assemble(SPEC)
    for parameter in module.parameters():  # large enough that no logit vanishes
        torch.nn.init.normal_(parameter, std=0.3)
    save("models/bcos", module, SPEC)
    (project / "picture.png").write_bytes(b"png")
    return module.eval()


@pytest.fixture
def put(model, manifest):
    def put(directory="models/bcos", metrics=METRICS, name=NAME, **keywords):
        evidence = {
            "manifest": manifest,
            "dataset": "objects",
            "pictures": ["picture.png"],
            "params": {"seed": 1},
        }
        return register(directory, experiment="demo", name=name, metrics=metrics, **(evidence | keywords))

    return put


def versions(client):
    return [str(item.version) for item in client.search_model_versions(f"name = '{NAME}'")]


def test_registering_twice_makes_one_version_with_its_evidence(put, client, model):
    first, second = put(tags={"recipe": "smoke"}), put(tags={"recipe": "smoke"})
    assert (first.created, second.created) == (True, False)
    assert first.version == second.version == "1"
    version = client.get_model_version_by_alias(NAME, "candidate")
    assert version.tags["content.sha256"] == first.digest
    assert version.tags["kind"] == "bcos"
    assert version.tags["dataset"] == "objects"
    assert version.tags["recipe"] == "smoke"
    assert version.tags["metric.test/accuracy"] == "0.5"
    assert "| test/gridpg | 0.25 |" in version.description
    assert "pictures/picture.png" in version.description
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {item.key: (item.value, item.dataset_name) for item in logged.metrics} == {
        "val/accuracy": (0.5, "objects"),
        "test/accuracy": (0.5, "objects"),
        "test/gridpg": (0.25, "objects"),
    }
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1"}
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["objects"]
    assert [item.path for item in client.list_artifacts(first.run_id, "pictures")] == ["pictures/picture.png"]

    images = torch.rand(2, 6, 16, 16)
    loaded, spec = load(f"models:/{NAME}@candidate")
    assert torch.equal(loaded(images), model(images))
    assert spec.classes == ("cat", "dog", "owl")
    assert torch.equal(load("models/bcos")[0](images), model(images))

    put(metrics={**METRICS, "test/accuracy": 0.75})
    assert versions(client) == ["1"]
    assert client.get_model_version(NAME, "1").tags["metric.test/accuracy"] == "0.75"


def test_the_alias_goes_to_another_version_that_is_not_worse_and_to_no_other(put, client, model):
    def holder():
        return str(client.get_model_version_by_alias(NAME, "candidate").version)

    put(compare="val/accuracy")
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    save("models/other", model, SPEC)
    worse, better = ({**METRICS, "val/accuracy": value} for value in (0.4, 0.6))
    assert put("models/other", worse, compare="val/accuracy").version == "2"
    assert holder() == "1"
    assert put("models/other", better, compare="val/accuracy").version == "2"
    assert holder() == "2"
    assert put(compare="val/accuracy").version == "1"
    assert holder() == "2"


def test_a_version_leads_to_its_training_and_to_the_experiment_of_dvc(put, client, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "tidy-owl")
    with stage_run("bcosify", experiment="demo", params={}, directory="runs/bcosify/0123") as run:
        run.model("models/bcos")
    first = put()
    tags = client.get_model_version(NAME, "1").tags
    assert tags["training.run"] == run.run_id != first.run_id
    assert tags["dvc.experiment"] == client.get_run(run.run_id).data.tags["dvc.experiment"] == "tidy-owl"
    assert tags["content.sha256"] == first.digest
    assert (
        f"MLflow run `{run.run_id}`, DVC experiment `tidy-owl`"
        in client.get_model_version(NAME, "1").description
    )
    monkeypatch.setenv("DVC_EXP_NAME", "other-owl")  # the same model again: it keeps its first origin
    before = client.get_model_version(NAME, "1")
    assert not put().created
    after = client.get_model_version(NAME, "1")
    assert (after.tags, after.description) == (before.tags, before.description)


def test_a_name_that_a_filter_cannot_quote_is_registered_once_like_others(put, client):
    put()
    name = """bob's "best" or name != '' v1.2 100%"""
    assert [put(name=name).created for _ in range(2)] == [True, False]
    assert load(f"models:/{name}@candidate")[1].classes == ("cat", "dog", "owl")
    assert versions(client) == ["1"]


def test_no_secret_of_an_address_reaches_the_registry(put, project, manifest, capsys):
    address = "https://user:s3cr3t@host/images.zip?X-Amz-Signature=s3cr3t"
    put(
        params={"root": address},
        tags={"from": address},
        manifest=manifest | {"source": f"imagefolder: {address}"},
    )
    assert b"s3cr3t" not in (project / "mlflow.db").read_bytes()
    assert b"host/images.zip?***" in (project / "mlflow.db").read_bytes()
    assert "s3cr3t" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("lost", ["database", "artifacts", "weights"])
def test_what_was_lost_is_made_again(put, client, project, empty_database, model, lost):
    put()
    if lost == "database":
        # Overwrites the file, because this process holds it open.
        shutil.copyfile(empty_database, project / "mlflow.db")
    elif lost == "artifacts":
        shutil.rmtree(project / "mlartifacts")
    else:
        next((project / "mlartifacts").rglob("model.safetensors")).unlink()
    again = put()
    assert again.created
    assert again.version == ("1" if lost == "database" else "2")
    images = torch.rand(2, 6, 16, 16)
    assert torch.equal(load(f"models:/{NAME}@candidate")[0](images), model(images))
    assert not put().created


SCORE = """
import mlflow, numpy as np
images = np.load("images.npy")
served = mlflow.pyfunc.load_model("models:/bcos-demo@candidate")
np.savez("scores.npz", **served.predict(images, params={"explain": True, "targets": [2, 0]}))
for bad, targets in ((images * 2, [0, 0]), (images, [3, 0]), (images, [1])):
    try:
        served.predict(bad, params={"explain": True, "targets": targets})
    except Exception as error:
        print("refused:", error)
"""


@pytest.mark.processes
def test_the_registered_model_scores_with_nothing_importable_but_what_it_declares(
    put, model, project, tmp_path
):
    put()
    logged = next((project / "mlartifacts").rglob("MLmodel")).parent
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    images = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    np.save(elsewhere / "images.npy", images)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    python = bare_environment((logged / "requirements.txt").read_text().splitlines(), tmp_path / "packages")
    done = subprocess.run(
        python, input=SCORE, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores = np.load(elsewhere / "scores.npz")
    inputs = add_inverse(torch.from_numpy(images))
    logits, weights = dynamic_weights(model, inputs, torch.tensor([2, 0]))
    assert np.array_equal(scores["logits"], logits.numpy())
    assert np.array_equal(scores["contributions"], contribution_map(inputs, weights).detach().numpy())
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == 3
    assert "images must be in [0, 1]" in refused[0]
    assert "class indices are 0 to 2" in refused[1]
    assert "1 for 2 images" in refused[2]
    assert all(len(line) < 120 for line in refused)
    assert not (tmp_path / "packages/rich").exists()


def test_a_dead_registry_is_one_line(put, monkeypatch, dead_server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_server)
    with pytest.raises(TrackingError, match="is not reachable") as failure:
        put()
    assert "\n" not in str(failure.value)
    with pytest.raises(TrackingError, match="is not reachable"):
        load(f"models:/{NAME}@candidate")


def test_a_damaged_database_is_one_line(put, project):
    (project / "mlflow.db").write_bytes(b"not a database, and long enough to be looked at" * 100)
    with pytest.raises(TrackingError, match="file is not a database") as failure:
        put()
    assert "\n" not in str(failure.value)


def test_what_the_registry_does_not_have_is_named(client):
    with pytest.raises(TrackingError, match="nothing"):
        load("models:/nothing@candidate")


def test_a_bad_name_leaves_no_run(put, client, manifest):
    with pytest.raises(TrackingError, match="Invalid model name"):
        register(
            "models/bcos", experiment="demo", name="a/b", metrics={}, manifest=manifest, dataset="objects"
        )
    experiment = connect(client.tracking_uri).get_experiment_by_name("demo")
    assert experiment is None


def test_what_is_refused_is_answered_in_one_line_that_does_not_repeat_the_input():
    from pipelines.tracking.served import InputError

    error = InputError("images must be in [0, 1], not 0 to 3")
    error.message = (
        f"Failed to predict data '[[3, 3, 3]]'. \nError: {error.message}"  # as MLflow's scoring server does
    )
    assert "[[3, 3, 3]]" not in error.message
    assert "images must be in [0, 1], not 0 to 3" in error.serialize_as_json()
