import json
from operator import attrgetter

import pytest

from pipelines.data.shards.manifest import MANIFEST, Manifest, read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.methods import check_pair
from pipelines.models import ModelError, ModelSpec
from pipelines.params import keyed, load, replaced
from pipelines.training import TrainingError
from pipelines.workflow.tasks import Task, check_boxes, check_captions, student_spec


def shards(folder, **fields):
    manifest = Manifest(("a", "b"), "multilabel", "nowhere", "0" * 64, dict.fromkeys(fields, ()), fields)
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return str(folder)


def test_a_data_set_without_boxes_cannot_guide(tmp_path):
    check_boxes(shards(tmp_path, train=("boxes",), val=("boxes",), test=()))
    with pytest.raises(
        DataError, match=r"guide.dataset: no image of val in .* has a box: guidance needs some"
    ):
        check_boxes(shards(tmp_path, train=("boxes",), val=("mask",), test=("boxes",)))


def test_a_data_set_without_captions_cannot_train_a_pair(tmp_path):
    check_captions(read_manifest(shards(tmp_path, train=("caption",), val=("caption",))), "some")
    with pytest.raises(DataError, match=r"clip.pairs: no image of val in some has a caption"):
        check_captions(read_manifest(shards(tmp_path, train=("caption",), val=("boxes",))), "some")


@pytest.mark.parametrize(
    "section",
    [
        "pretrain",
        "bcosify.scratch",
        "distill.e2kd",
        "guide.classify",
        "guide.guided",
        "clip.cnn.pretrain",
        "clip.vit.bcosify",
    ],
)
def test_errors_about_training_params_name_their_key(section):
    names = {"guide.classify": "classify", "guide.guided": "guide"}
    names |= {"clip.cnn.pretrain": "image_text/cnn", "clip.vit.bcosify": "clip/vit"}
    name = names.get(section, section.replace(".", "/"))
    params = load()
    task = Task(params, name, attrgetter(section)(params), build=lambda: None, spec=None)
    assert task.section == section
    with (
        pytest.raises(TrainingError, match=rf"^{section}\.select: no metric$"),
        keyed(task.section, task.method),
    ):
        raise TrainingError("select: no metric")
    with pytest.raises(TrainingError, match=r"^the loss is NaN: 3$"), keyed(task.section, task.method):
        raise TrainingError("the loss is NaN: 3")


def test_a_teacher_that_does_not_fit_is_told_by_its_key():
    params = load()
    teacher = ModelSpec("resnet8", ("a", "b"), 32, "conventional")
    student = ModelSpec("resnet8", ("a", "b"), 32, "bcos")
    with (
        pytest.raises(ModelError, match=r"^distill\.teacher: a conventional teacher"),
        keyed("distill", params.distill),
    ):
        check_pair(student, teacher, explained=True)


def test_a_model_is_normalised_as_its_weights_want_it():
    half, own = (0.5, 0.5, 0.5), (0.4, 0.5, 0.6)
    known = ModelSpec("resnet8", ("a", "b"), 32, "conventional")
    vit = {"distill.student.name": "timm:vit_tiny_patch16_224", "distill.student.weights": "pretrained"}
    manifest = Manifest(known.classes, "multiclass", "nowhere", "0" * 64, {}, {})
    spec = student_spec(replaced(load(), vit), manifest, known)
    assert (spec.mean, spec.std, spec.weights_view["interpolation"]) == (half, half, "bicubic")
    spec = student_spec(replaced(load(), {**vit, "distill.student.mean": own}), manifest, known)
    assert (spec.mean, spec.std) == (own, half)
    spec = student_spec(load(), manifest, known)
    assert (spec.mean, spec.weights_view) == (ModelSpec.mean, {})
