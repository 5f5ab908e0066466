"""Text localisation: scores of the texts' maps, the boxes' share, and texts of one image compared."""

import pandas
import pytest
import torch

from pipelines import models
from pipelines.attribution import attribute, last_features
from pipelines.bcos import add_inverse
from pipelines.data.loading.loader import loader
from pipelines.data.shards.sample import DataError
from pipelines.evaluation.figures import pointing_figures
from pipelines.evaluation.scores import pointing_to_own
from pipelines.evaluation.text_localisation import evaluate_text_localisation
from pipelines.metrics import area_share, box_masks, energy_pointing_game, select_boxes
from pipelines.models import ModelSpec, ZeroShotNetwork, zero_shot_weights
from pipelines.params import ClipEvaluateParams, DataParams
from pipelines.training import Context
from tests.support.drawn import CLASSES, drawn_shards
from tests.support.loading import write
from tests.support.small_clip import SIDE, small_clip
from tests.support.toy_source import plain

DATA = DataParams(image_size=SIDE, augment="none")
PARAMS = ClipEvaluateParams(batch_size=5)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip"))


def test_maps_are_those_of_the_texts_and_gradcam_of_the_original_stands_beside(towers, tmp_path):
    counts = {"train": 2, "val": 2, "test": 12}
    shards = drawn_shards(
        tmp_path, 6, variant="scenes", image_size=SIDE, objects_per_image=(1, 3), counts=counts
    )
    found = evaluate_text_localisation(Context(), towers, shards, DATA, PARAMS)
    assert found["images"] == 12
    assert {name: list(of_model) for name, of_model in found["models"].items()} == {
        "original": ["gradcam"],
        "bcos": ["bcos"],
    }
    (batch,) = loader(shards, "test", DATA, 12)
    rows, targets = batch["labels"].nonzero(as_tuple=True)
    images = add_inverse(batch["image"])[rows]
    masks = box_masks(select_boxes(batch["boxes"], rows, targets), targets, (SIDE, SIDE))
    texts = zero_shot_weights(models.load_text_tower(towers["bcos"]), CLASSES, "plain")
    for name, method in (("original", "gradcam"), ("bcos", "bcos")):
        network = ZeroShotNetwork(models.load(towers[name])[0], texts, 100.0).eval()
        maps = attribute(network, images, targets, method=method)
        own = found["models"][name][method]
        assert own["epg"] == pytest.approx(energy_pointing_game(maps, masks).mean().item(), abs=1e-4)
        assert own["box_share"] == pytest.approx(area_share(masks).mean().item())
        assert own["pairs"] == len(rows)
        assert {"on_object_epg", "size_corrected_epg", "iou_at_0.5", "points_to_own"} <= set(own)
        assert "iou" not in own  # its threshold would have to be chosen on other images
    assert (
        found["models"]["bcos"]["bcos"]["unexplained_share"] < 1e-4
    )  # contributions sum to the cosine, because the norm is held
    published = PARAMS.model_copy(update={"hold_norm": False})
    own = evaluate_text_localisation(Context(), {"bcos": towers["bcos"]}, shards, DATA, published)["models"][
        "bcos"
    ]["bcos"]
    assert own["unexplained_share"] == pytest.approx(
        1, abs=1e-3
    )  # with the norm differentiated, contributions sum to 0


def test_gradcam_explains_the_last_features_before_an_attention_pool():
    options = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    }
    tower = models.assemble(
        ModelSpec("open_clip:custom", (), 64, "conventional", task="embedding", options=options)
    )
    assert (
        last_features(ZeroShotNetwork(tower, torch.randn(3, 16)), torch.rand(1, 6, 64, 64))
        == "tower.network.layer4"
    )


def scores_between(maps, masks, rows):
    columns = pointing_to_own(maps, masks, torch.tensor(rows))
    table = pandas.DataFrame({name: values.numpy() for name, values in columns.items()})
    found = pointing_figures(table.assign(box_share=1.0))
    assert found.pop("box_share") == 1
    return found


def test_texts_point_to_their_own_object_where_their_map_has_more_energy_than_the_others():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, :, :2], masks[1, :, 2:], masks[2, :, :3], masks[3] = (
        True,
        True,
        True,
        True,
    )  # the last two overlap
    right = masks.float() + 0.1
    found = scores_between(right, masks, [0, 0, 1, 2])  # one image of two classes
    assert (found["points_to_own"], found["points_to_own_pairs"], found["points_to_own_chance"]) == (
        1.0,
        2,
        0.5,
    )
    assert scores_between(right.flip(0)[2:], masks[:2], [0, 0])["points_to_own"] < 1
    assert scores_between(right[[1, 0]], masks[:2], [0, 0])["points_to_own"] == 0
    assert (
        scores_between(torch.ones(2, 4, 4), masks[:2], [0, 0])["points_to_own"] == 0
    )  # maps that do not depend on the text
    assert (
        scores_between(right[2:], masks[2:], [0, 0])["points_to_own_pairs"] == 1
    )  # the first lies in the second's box
    assert scores_between(right, masks, [0, 1, 2, 3]) == {}


def test_towers_without_features_for_gradcam_are_evaluated_without(towers, tmp_path, capsys):
    options = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    }
    spec = ModelSpec("open_clip:custom", (), SIDE, "conventional", task="embedding", options=options)
    models.save(tmp_path / "vit", models.assemble(spec), spec)
    shards = drawn_shards(tmp_path, 2, image_size=SIDE, counts={"train": 2, "val": 2, "test": 2})
    texts = {"vit": towers["original"]}
    found = evaluate_text_localisation(
        Context(), {"vit": str(tmp_path / "vit")}, shards, DATA, PARAMS, texts=texts
    )
    assert found["models"] == {"vit": {}}
    assert "no convolutional features" in capsys.readouterr().out


def test_data_without_boxes_or_labels_are_named(towers, tmp_path):
    bare = [plain(number) for number in range(4)]
    with pytest.raises(DataError, match="no image of train has a box"):
        evaluate_text_localisation(Context(), towers, write(tmp_path / "bare", bare), DATA, PARAMS, "train")
    with pytest.raises(DataError, match="images without labels"):
        evaluate_text_localisation(
            Context(), towers, write(tmp_path / "none", bare, task="unlabelled"), DATA, PARAMS, "train"
        )
