"""Image towers and zero-shot classifiers can be registered, with their text tower."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.bcos import add_inverse, contribution_map, dynamic_weights
from pipelines.models import (
    ModelSpec,
    assemble,
    build_text_tower,
    digest,
    save,
    save_text_tower,
    zero_shot_classifier,
)
from pipelines.tracking import load, load_text_tower, register
from pipelines.workflow.places import take_model
from tests.support.bare import bare_environment
from tests.support.clip import TEXT, TIMM

NAMES = ("cat", "dog", "owl")
SPEC = ModelSpec(
    "open_clip:custom", (), 64, "bcos", task="embedding", options={"embed_dim": 16, "vision_cfg": TIMM}
)


@pytest.fixture
def towers(project):
    """The two towers, in evaluation mode, saved in `models/clip`."""
    torch.manual_seed(0)
    image = assemble(SPEC)
    for _ in range(10):  # norms learn their statistics
        image(torch.rand(8, 6, 64, 64))
    text = build_text_tower("custom", options={"embed_dim": 16, "text_cfg": TEXT}).eval()
    save("models/clip", image.eval(), SPEC)
    save_text_tower("models/clip", text)
    return image, text


@pytest.fixture
def put(towers, manifest):
    def put(directory, name):
        return register(
            directory,
            experiment="demo",
            name=name,
            metrics={"val/cosine": 0.5},
            manifest=manifest,
            dataset="objects",
        )

    return put


def test_a_version_brings_its_text_tower(put, towers, client):
    image, text = towers
    first, second = put("models/clip", "clip"), put("models/clip", "clip")
    assert (first.created, second.created) == (True, False)
    uri, images = "models:/clip@candidate", torch.rand(2, 6, 64, 64)
    loaded, spec = load(uri)
    assert torch.equal(loaded(images), image(images))
    assert (spec.task, spec.classes) == ("embedding", ())
    assert torch.equal(load_text_tower(uri).encode(["a dog"]), text.encode(["a dog"]))
    description = client.get_model_version("clip", "1").description
    assert "(bcos, embedding), embeddings, 64 x 64 px" in description
    assert "texts = load_text_tower('models:/clip/1')" in description
    for source in (uri, "models/clip"):
        take_model(source, Path("models/copy"))
        assert digest("models/copy") == digest("models/clip")


def test_another_text_tower_makes_another_version_and_none_is_a_version_too(put, towers):
    versions = [put("models/clip", "clip").version]
    save_text_tower("models/clip", build_text_tower("custom", options={"embed_dim": 16, "text_cfg": TEXT}))
    versions.append(put("models/clip", "clip").version)
    save("models/alone", towers[0], SPEC)
    versions.append(put("models/alone", "clip").version)
    assert versions == ["1", "2", "3"]
    with pytest.raises(FileNotFoundError, match="no text tower in"):
        load_text_tower("models:/clip/3")


SCORE = """
import mlflow, numpy as np
images = np.load("images.npy")
tower = mlflow.pyfunc.load_model("models:/tower@candidate")
classifier = mlflow.pyfunc.load_model("models:/classifier@candidate")
scores = classifier.predict(images, params={"explain": True, "targets": [2, 0]})
np.savez("scores.npz", **tower.predict(images), **scores)
try:
    tower.predict(images, params={"explain": True})
except Exception as error:
    print("refused:", error)
"""


@pytest.mark.processes
def test_they_score_with_nothing_importable_but_what_the_versions_declare(put, towers, project, tmp_path):
    image, text = towers
    model, spec = zero_shot_classifier(image, SPEC, text, NAMES, "plain")
    save("models/classifier", model, spec)
    put("models/clip", "tower")
    put("models/classifier", "classifier")
    logged = [path.parent for path in (project / "mlartifacts").rglob("MLmodel")]
    declared = {(folder / "requirements.txt").read_text() for folder in logged}
    assert len(logged) == 2
    assert len(declared) == 1
    requirements = declared.pop()
    assert "open_clip_torch==" in requirements
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    images = np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32)
    np.save(elsewhere / "images.npy", images)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    python = bare_environment(requirements.splitlines(), tmp_path / "packages")
    done = subprocess.run(
        python, input=SCORE, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores, inputs = np.load(elsewhere / "scores.npz"), add_inverse(torch.from_numpy(images))
    logits, weights = dynamic_weights(model, inputs, torch.tensor([2, 0]))
    with torch.no_grad():
        assert np.array_equal(scores["embeddings"], image(inputs).numpy())
    assert np.array_equal(scores["logits"], logits.numpy())
    assert np.array_equal(scores["contributions"], contribution_map(inputs, weights).numpy())
    assert "refused: explain: an image tower has no classes" in done.stdout
