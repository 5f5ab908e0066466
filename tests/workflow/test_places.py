from pipelines.params import ModelParams
from pipelines.workflow.places import absolute_weights


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
