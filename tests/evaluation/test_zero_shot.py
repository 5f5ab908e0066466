"""Zero-shot accuracy: equal to that of the cosines on any number of workers; refused data and folders."""

import shutil

import pytest
import torch
import torch.multiprocessing as mp

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.data.loading.loader import loader
from pipelines.data.shards.sample import DataError
from pipelines.evaluation.linear_probe import evaluate_linear_probe
from pipelines.evaluation.retrieval import evaluate_retrieval
from pipelines.evaluation.text2concept import evaluate_text2concept
from pipelines.evaluation.text_localisation import evaluate_text_localisation
from pipelines.evaluation.zero_shot import evaluate_zero_shot
from pipelines.models import ModelError, ModelSpec, zero_shot_weights
from pipelines.params import ClipEvaluateParams, DataParams
from pipelines.training import Context
from tests.support.drawn import CLASSES, drawn_shards, flat
from tests.support.small_clip import SIDE, small_clip

DATA = DataParams(image_size=SIDE, augment="none")
PARAMS = ClipEvaluateParams(batch_size=7, text_batch=5, templates=("a {}.", "one {}"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    counts = {"train": 12, "val": 2, "test": 15}
    return drawn_shards(tmp_path_factory.mktemp("objects"), 10, image_size=SIDE, counts=counts, captions=True)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("classifier"), ModelSpec("resnet8", CLASSES, SIDE, "bcos")
    models.save(folder, models.assemble(spec), spec)
    return str(folder)


def everything(context, towers, classifier, shards):
    where = (shards, DATA, PARAMS)
    probe = PARAMS.model_copy(
        update={"probe": PARAMS.probe.model_copy(update={"epochs": 1, "batch_size": 8})}
    )
    return {
        "zero_shot": evaluate_zero_shot(context, towers, *where),
        "retrieval": evaluate_retrieval(context, towers, *where),
        "localisation": evaluate_text_localisation(context, towers, *where),
        "probe": evaluate_linear_probe(context, towers, shards, DATA, probe),
        "text2concept": evaluate_text2concept(context, {"bcos": classifier}, towers["original"], *where),
    }


def on_rank(rank, world_size, folder, *arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save(everything(Context(rank, world_size), *arguments), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_two_workers_find_what_one_finds(towers, classifier, shards, tmp_path):
    alone = everything(Context(), towers, classifier, shards)
    mp.get_context("forkserver").set_forkserver_preload(["pipelines.evaluation.text2concept"])
    mp.start_processes(
        on_rank, (2, tmp_path, towers, classifier, shards), nprocs=2, start_method="forkserver"
    )
    for rank in range(2):
        together = dict(flat(torch.load(tmp_path / f"{rank}.pt")))
        assert together == pytest.approx(dict(flat(alone)), abs=1e-4)


def test_accuracy_is_that_of_the_cosines(towers, shards):
    found = evaluate_zero_shot(Context(), towers, shards, DATA, PARAMS)
    assert (found["images"], found["classes"], found["skipped"]) == (15, len(CLASSES), 0)
    (batch,) = loader(shards, "test", DATA, 15)
    for name, folder in towers.items():
        texts = zero_shot_weights(models.load_text_tower(folder), CLASSES, PARAMS.templates)
        with torch.no_grad():
            cosines = (
                torch.nn.functional.normalize(models.load(folder)[0](add_inverse(batch["image"])), dim=1)
                @ texts.T
            )
        right = cosines.topk(5).indices == batch["label"][:, None]
        assert found["models"][name]["accuracy"] == pytest.approx(right[:, 0].float().mean().item())
        assert found["models"][name]["accuracy_top5"] == pytest.approx(right.any(1).float().mean().item())


def test_own_names_take_the_place_of_the_datas_and_are_cached(towers, shards, tmp_path):
    names = tuple(f"shape {name}" for name in CLASSES)
    params = PARAMS.model_copy(update={"names": names})
    found = [
        evaluate_zero_shot(Context(), towers, shards, DATA, params, cache=str(tmp_path)) for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(list(tmp_path.iterdir())) == 1  # both towers share a text tower
    with pytest.raises(DataError, match=f"2 names for the {len(CLASSES)} classes"):
        evaluate_zero_shot(Context(), towers, shards, DATA, PARAMS.model_copy(update={"names": ("a", "b")}))
    with pytest.raises(ModelError, match="same name 'a'"):
        evaluate_zero_shot(
            Context(), towers, shards, DATA, PARAMS.model_copy(update={"names": ("a",) * len(CLASSES)})
        )


def test_the_text_tower_may_lie_elsewhere(towers, shards, tmp_path):
    shutil.copytree(towers["bcos"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "text.json").unlink()
    with pytest.raises(ModelError, match="no text tower"):
        evaluate_zero_shot(Context(), {"bcos": str(tmp_path)}, shards, DATA, PARAMS)
    texts = {"bcos": towers["original"]}
    found = evaluate_zero_shot(Context(), {"bcos": str(tmp_path)}, shards, DATA, PARAMS, texts=texts)
    assert (
        found["models"]["bcos"]
        == evaluate_zero_shot(Context(), towers, shards, DATA, PARAMS)["models"]["bcos"]
    )


def test_what_cannot_be_classified_is_named(towers, classifier, shards, tmp_path):
    with pytest.raises(ModelError, match="not an image tower"):
        evaluate_zero_shot(Context(), {"model": classifier}, shards, DATA, PARAMS)
    counts = {"train": 2, "val": 2, "test": 2}
    several = drawn_shards(
        tmp_path, 2, variant="scenes", image_size=SIDE, objects_per_image=(1, 2), counts=counts
    )
    with pytest.raises(DataError, match="several labels"):
        evaluate_zero_shot(Context(), towers, several, DATA, PARAMS)
