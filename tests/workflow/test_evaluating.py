"""Published checkpoints beside the models of a run."""

import pytest
import torch

from pipelines import models, params
from pipelines.evaluation import load_explained_model
from pipelines.models import ModelError
from pipelines.models.published import published_spec
from pipelines.params import ParamsError
from pipelines.workflow.evaluating import published_models

CLASSES = tuple(f"n{index:08}" for index in range(1000))


@pytest.fixture
def resnet18(tmp_path):
    """A B-cos ResNet-18 and a file of its weights under the names of B-cos-v2."""
    torch.manual_seed(0)
    model = models.assemble(published_spec("b-cos-v2:resnet18")).eval()
    state = {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("body.")
        layer = name.replace(".weight", ".linear.weight") if value.ndim > 1 else name
        state[layer] = value[..., None, None] if name == "fc.weight" else value
    torch.save(state, tmp_path / "resnet_18.pth")
    return model, str(tmp_path / "resnet_18.pth")


def run_with(published):
    everything = params.load().model_dump()
    everything["evaluate"]["published"] = published
    return params.validate(everything)


def test_a_published_checkpoint_is_evaluated_like_a_model_of_the_run(resnet18, tmp_path, monkeypatch):
    model, file = resnet18
    run = run_with({"published": {"name": "b-cos-v2:resnet18", "weights": file}})
    monkeypatch.chdir(tmp_path)
    folders = published_models(run, CLASSES)
    assert list(folders) == ["published"]
    explained = load_explained_model(folders["published"], (), torch.device("cpu"))
    images = torch.rand(2, 6, 64, 64)
    torch.testing.assert_close(explained.model(images), model(images))
    assert explained.spec.classes == CLASSES
    assert set(explained.explanations) == {"bcos"}


def test_names_of_the_run_and_other_classes_are_refused(resnet18, tmp_path, monkeypatch):
    here = {"name": "b-cos-v2:resnet18", "weights": resnet18[1]}
    other = run_with({"published": here})
    # Names that are taken in the reports, and among the inputs of the run.
    taken = {name: run_with({name: here}) for name in ("bcosified", "pretrained")}
    monkeypatch.chdir(tmp_path)
    for name, run in taken.items():
        with pytest.raises(
            ParamsError, match=rf"evaluate\.published\.{name}: something of this run has that name already"
        ):
            published_models(run, CLASSES)
    with pytest.raises(ModelError, match="1000 classes of ImageNet, not for 10"):
        published_models(other, CLASSES[:10])
