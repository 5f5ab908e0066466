from pathlib import Path

from pipelines.models import (
    ConventionalNetwork,
    ModelSpec,
    build,
    build_text_tower,
    digest,
    load_text_tower,
    save,
    save_text_tower,
)
from pipelines.params import ModelParams
from pipelines.workflow.places import take_model
from pipelines.workflow.sharing import absolute_weights
from pipelines.workflow.submitted_job import input_upload
from tests.support.clip import TEXT


def test_a_local_weights_file_is_known_by_its_path_and_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.th").write_bytes(b"one")
    first = absolute_weights(ModelParams(name="resnet8", weights="weights.th"))
    (tmp_path / "weights.th").write_bytes(b"two")
    second = absolute_weights(ModelParams(name="resnet8", weights="weights.th"))
    assert first.weights == second.weights == str(tmp_path / "weights.th")
    assert first.sha256 != second.sha256
    tag = ModelParams(name="resnet18", weights="IMAGENET1K_V1")
    assert absolute_weights(tag) == tag


def test_in_a_copy_that_dvc_makes_the_users_weights_and_models_are_found_too(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc/tmp/exps/tmp1"
    copy.mkdir(parents=True)
    (tmp_path / "weights.th").write_bytes(b"one")
    model = ConventionalNetwork(build("resnet8", num_classes=2))
    save(tmp_path / "mine", model, ModelSpec("resnet8", ("a", "b"), 16, "conventional"))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert absolute_weights(ModelParams(name="resnet8", weights="weights.th")).weights == str(
        tmp_path / "weights.th"
    )
    for number, source in enumerate(("mine", "mine/model.json", "./mine/")):
        take_model(source, Path(f"models/{number}"))
        assert digest(f"models/{number}") == digest(tmp_path / "mine")


def test_a_text_tower_goes_with_its_model_to_a_submitted_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec("resnet8", ("a", "b"), 16, "conventional")
    for name in ("alone", "clip"):
        save(f"models/{name}", ConventionalNetwork(build("resnet8", num_classes=2)), spec)
    text = build_text_tower("custom", options={"embed_dim": 16, "text_cfg": TEXT})
    save_text_tower("models/clip", text)
    upload = input_upload("models", f"memory://{tmp_path}")
    assert sorted(upload.names) == [
        *("alone/model.json", "alone/model.safetensors"),
        *(f"clip/{name}" for name in ("model.json", "model.safetensors", "text.json", "text.safetensors")),
    ]
    there = load_text_tower(f"{upload.run()}/clip")
    assert all(map(lambda a, b: a.equal(b), there.state_dict().values(), text.state_dict().values()))
