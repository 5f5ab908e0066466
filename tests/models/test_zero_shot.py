"""Zero-shot classifiers: cosines of images and texts, text embeddings of classes, models on disk."""

import dataclasses

import open_clip
import pytest
import torch
from torch.nn import functional as F

from pipelines.bcos import contribution_map, dynamic_weights
from pipelines.models import (
    ModelError,
    ModelSpec,
    ZeroShotNetwork,
    assemble,
    build_text_tower,
    load,
    save,
    templates_of,
    zero_shot_classifier,
    zero_shot_weights,
)
from pipelines.models.clip import embedding_width
from pipelines.models.zero_shot import check_names, imagenet_names
from tests.support.clip import TEXT, TIMM

NAMES = ("dog", "tabby cat", "church")
SPEC = ModelSpec(
    "open_clip:custom", (), 64, "bcos", task="embedding", options={"embed_dim": 16, "vision_cfg": TIMM}
)


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return build_text_tower("custom", options={"embed_dim": 16, "text_cfg": TEXT}).eval()


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    tower = assemble(SPEC)
    for _ in range(10):  # statistics that are not the initial ones
        tower(torch.rand(8, 6, 64, 64))
    return tower.eval()


@pytest.fixture
def sizes(text):
    """The number of texts in each forward pass of the text tower."""
    sizes = []
    handle = text.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    handle.remove()


@pytest.mark.parametrize("templates", ["plain", "simple", "imagenet", ["a drawing of {}", "{}, {}"]])
def test_text_embeddings_are_those_of_open_clip(text, templates):
    wanted = open_clip.build_zero_shot_classifier_legacy(
        Encoder(text),
        lambda texts: open_clip.tokenize(texts, 12),
        NAMES,
        [t.replace("{}", "{0}") for t in templates_of(templates)],
    )
    torch.testing.assert_close(zero_shot_weights(text, NAMES, templates), wanted.T)


class Encoder:
    def __init__(self, text):
        self.encode_text = text


def test_templates_and_names_are_open_clips():
    assert len(templates_of("imagenet")) == 80
    assert len(templates_of("simple")) == 7
    assert templates_of("plain") == ("a photo of a {}.",)
    assert templates_of(["this is {}"]) == ("this is {}",)
    assert imagenet_names() == tuple(open_clip.IMAGENET_CLASSNAMES)
    check_names(imagenet_names())  # although two pairs of classes share a name


def test_the_batch_bounds_what_is_encoded_at_a_time_and_changes_nothing(text, sizes):
    whole = zero_shot_weights(text, NAMES, "imagenet", batch_size=1000)
    assert sizes == [240]
    sizes.clear()
    torch.testing.assert_close(zero_shot_weights(text, NAMES, "imagenet", batch_size=7), whole)
    assert max(sizes) == 7
    assert sum(sizes) == 240


def test_text_embeddings_are_computed_once_for_a_text_tower_names_and_templates(text, sizes, tmp_path):
    first = zero_shot_weights(text, NAMES, "plain", cache=str(tmp_path))
    assert sum(sizes) == 3
    assert torch.equal(zero_shot_weights(text, NAMES, "plain", cache=str(tmp_path)), first)
    assert sum(sizes) == 3
    for names, templates in ((NAMES[::-1], "plain"), (NAMES, ["{}"])):
        before = sum(sizes)
        zero_shot_weights(text, names, templates, cache=str(tmp_path))
        assert sum(sizes) == before + 3
    with torch.no_grad():
        text.text.ln_final.weight[0] += 1
    zero_shot_weights(text, NAMES, "plain", cache=str(tmp_path))
    assert sum(sizes) == 12
    with torch.no_grad():
        text.text.ln_final.weight[0] -= 1


def test_bad_names_and_templates_are_named(text):
    for names, told in (
        (["dog", "cat", "dog"], "classes 0 and 2 have the same name 'dog'"),
        (["dog", " "], "class 1 is empty"),
        ([], "no names"),
    ):
        with pytest.raises(ModelError, match=told):
            zero_shot_weights(text, names)
    for templates, told in (
        (["a {}", "a photo"], "template 'a photo' has no place"),
        ("imagnet", "unknown templates"),
        ([], "no templates"),
    ):
        with pytest.raises(ModelError, match=told):
            zero_shot_weights(text, NAMES, templates)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_no_positive_number_is_refused(tower, text, scale):
    with pytest.raises(ModelError, match=f"the scale of cosines is a finite number above 0, not {scale}"):
        zero_shot_classifier(tower, SPEC, text, NAMES, "plain", scale=scale)


def test_towers_of_different_widths_are_refused(tower):
    narrow = build_text_tower("custom", options={"embed_dim": 8, "text_cfg": TEXT})
    with pytest.raises(ModelError, match="embeddings of 16 numbers for images and 8 for texts"):
        zero_shot_classifier(tower, SPEC, narrow, NAMES, "plain")


@pytest.mark.parametrize("kind", ["bcos", "conventional"])
def test_a_saved_classifier_gives_the_same_cosines(tower, text, tmp_path, kind):
    spec = dataclasses.replace(SPEC, kind=kind)
    tower = tower if kind == "bcos" else assemble(spec).eval()
    save(tmp_path / "tower", tower, spec)
    model, of_model = zero_shot_classifier(tmp_path / "tower", spec, text, NAMES, "plain")
    save(tmp_path / "model", model, of_model)
    loaded, read = load(tmp_path / "model")
    images = torch.rand(2, 6, 64, 64)
    wanted = (
        100 * F.normalize(tower(images), dim=-1) @ text.encode([f"a photo of a {name}." for name in NAMES]).T
    )
    torch.testing.assert_close(loaded(images), wanted)
    assert torch.equal(loaded(images), model(images))
    assert (read.task, read.classes, read.zero_shot) == ("multiclass", NAMES, {"scale": 100.0, "width": 16})
    assert torch.equal(loaded.mean, tower.mean)
    assert torch.equal(loaded.std, tower.std)
    assert torch.equal(loaded.tower(images), tower(images))


def test_contributions_of_a_cosine_sum_to_it(tower, text):
    model = ZeroShotNetwork(tower.double(), zero_shot_weights(text, NAMES, "plain").double()).eval()
    images = torch.rand(2, 6, 64, 64, dtype=torch.float64)
    targets = torch.arange(3).expand(2, 3)
    cosines, weights = dynamic_weights(model, images, targets)
    contributions = contribution_map(images - model.mean[:, None, None], weights).sum((-2, -1))
    torch.testing.assert_close(contributions, cosines, atol=1e-6, rtol=0)
    differentiated = ZeroShotNetwork(model.tower, model.head.texts, hold_norm=False)
    _, weights = dynamic_weights(differentiated, images, targets)
    assert contribution_map(images - model.mean[:, None, None], weights).sum((-2, -1)).abs().max() < 1e-6
    tower.float()


def test_many_texts_of_an_image_take_one_forward_pass(tower, text):
    model = ZeroShotNetwork(tower, zero_shot_weights(text, NAMES, "plain"))
    passes = []
    handle = tower.register_forward_pre_hook(lambda *_: passes.append(1))
    _, weights = dynamic_weights(model, torch.rand(1, 6, 64, 64), torch.tensor([[0, 1, 2]]))
    handle.remove()
    assert weights.shape == (1, 3, 6, 64, 64)
    assert len(passes) == 1


def test_the_width_of_an_image_tower_of_another_library_is_its_number_of_outputs() -> None:
    assert embedding_width("vitc_ti", {"num_classes": 48, "depth": 1}) == 48
    with pytest.raises(ModelError, match=r"^resnet20 becomes an image tower by"):
        embedding_width("resnet20", {})
