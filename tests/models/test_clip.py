"""Towers of open_clip by name, config, tag or file; text towers on disk."""

import dataclasses
import json
import logging
import sys

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional as F

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.models import (
    ModelError,
    ModelSpec,
    WeightsError,
    assemble,
    build,
    build_text_tower,
    chosen_preprocessing,
    clip,
    clip_config,
    digest,
    has_text_tower,
    load_text_tower,
    preprocessing_of,
    resolved_name,
    save_text_tower,
)
from pipelines.storage.publish import publish
from tests.support.clip import CONFIG, RN, TEXT, TIMM, VIT

SIZE = 64


@pytest.fixture
def config(tmp_path):
    """A config file in open_clip's format, with a small timm network as the image tower's trunk."""
    path = tmp_path / "my.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def whole():
    """open_clip's own `CLIP` and `CustomTextCLIP` with the same weights."""
    torch.manual_seed(0)
    parts = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
    plain, custom = open_clip.CLIP(**parts).eval(), open_clip.CustomTextCLIP(**parts).eval()
    custom.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(plain.state_dict()))
    return plain, custom


def small(**more):
    """Options of `open_clip:custom` that build the image tower of `whole`."""
    return {"embed_dim": 16, "vision_cfg": VIT, **more}


# Names and configs


def test_configs_of_names_and_files(config, tmp_path):
    assert clip_config("RN50") == clip_config("open_clip:RN50") == open_clip.get_model_config("RN50")
    assert clip_config(config) == CONFIG
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    assert clip_config(str(tmp_path / "open_clip_config.json")) == CONFIG


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    for call in (
        lambda: build("open_clip:RN5O"),
        lambda: clip_config("RN5O"),
        lambda: build_text_tower("RN5O"),
    ):
        with pytest.raises(
            ModelError, match=r"unknown model '(open_clip:)?RN5O' of open_clip; near it: RN50, "
        ):
            call()
    with pytest.raises(ModelError, match=r"missing.json: not a readable JSON file"):
        build(f"open_clip:{tmp_path}/missing.json")
    (tmp_path / "other.json").write_text(json.dumps({"embed_dim": 4, "vision_cfg": []}))
    with pytest.raises(ModelError, match=r"other.json: no config of open_clip: vision_cfg, text_cfg missing"):
        build(f"open_clip:{tmp_path}/other.json")


def test_an_image_tower_gives_embeddings_and_takes_options(config):
    images = torch.rand(2, 3, SIZE, SIZE)
    assert build(f"open_clip:{config}")(images).shape == (2, 16)
    assert build(f"open_clip:{config}", options={"embed_dim": 8})(images).shape == (2, 8)
    assert build(f"open_clip:{config}", options={"timm_proj": "mlp"}).head.mlp.fc2.out_features == 16
    assert build("open_clip:custom", options=small())(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    assert build("open_clip:custom", options={"embed_dim": 16, "vision_cfg": RN})(
        torch.rand(2, 3, 64, 64)
    ).shape == (2, 16)
    with pytest.raises(ModelError, match="nonsense"):
        build(f"open_clip:{config}", options={"nonsense": 1})
    with pytest.raises(ModelError, match=r"cannot be built with vision_cfg .*'width': 8.*: [^\n]+$"):
        build("open_clip:custom", options=small(width=8))  # narrower than an attention head
    with pytest.raises(WeightsError, match="a sha256 is that of a file"):
        build(f"open_clip:{config}", sha256="0" * 64)
    with pytest.raises(ModelError, match="takes no num_classes"):
        build(f"open_clip:{config}", num_classes=3)
    with pytest.raises(ModelError, match="open_clip:custom needs the options embed_dim, vision_cfg"):
        build("open_clip:custom")


def test_a_config_file_becomes_options(config, tmp_path):
    name, options = resolved_name(f"open_clip:{config}", {"embed_dim": 8, "timm_drop": 0.1})
    assert name == "open_clip:custom"
    assert options == {
        "embed_dim": 8,
        "quick_gelu": False,
        "vision_cfg": {**CONFIG["vision_cfg"], "timm_drop": 0.1},
    }
    for unchanged in (("open_clip:RN50", {"embed_dim": 8}), ("resnet8", {"width": 4}), (name, options)):
        assert resolved_name(*unchanged) == unchanged
    built = build(name, options=options)
    assert [value.shape for value in built.state_dict().values()] == [
        value.shape for value in build(f"open_clip:{config}", options={"embed_dim": 8}).state_dict().values()
    ]


def test_models_need_no_open_clip_for_other_networks(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    build("resnet8")
    with pytest.raises(ModelError, match="need the package open_clip_torch"):
        build("open_clip:RN50")


# Weights


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "custom"])
def test_both_towers_of_a_whole_clip_are_those_of_open_clip(whole, tmp_path, kind):
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in whole[kind].state_dict().items()}},
        tmp_path / "clip.pt",
    )
    image = build("open_clip:custom", str(tmp_path / "clip.pt"), options=small()).eval()
    text = build_text_tower(
        "custom", str(tmp_path / "clip.pt"), options={"embed_dim": 16, "text_cfg": TEXT}
    ).eval()
    images, texts = torch.rand(2, 3, 32, 32), ["a photo of a dog", "two cats"]
    assert torch.equal(image(images), whole[kind].encode_image(images))
    assert torch.equal(text(text.tokens(texts)), whole[kind].encode_text(open_clip.tokenize(texts, 12)))
    assert [key for key in whole[1].state_dict() if key.startswith("text.")] == list(text.state_dict())


def test_the_file_of_one_tower_is_taken_too(whole, tmp_path):
    for part in ("visual", "text"):
        safetensors.torch.save_file(getattr(whole[1], part).state_dict(), tmp_path / f"{part}.safetensors")
    image = build("open_clip:custom", str(tmp_path / "visual.safetensors"), options=small())
    text = build_text_tower(
        "custom", str(tmp_path / "text.safetensors"), options={"embed_dim": 16, "text_cfg": TEXT}
    )
    assert torch.equal(image.proj, whole[0].visual.proj)
    assert torch.equal(text.text.text_projection, whole[0].text_projection)
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="no text tower among"):
        build_text_tower("custom", str(tmp_path / "other.pt"), options={"embed_dim": 16, "text_cfg": TEXT})


def test_positions_are_resized_to_another_image_size(whole, tmp_path):
    torch.save(whole[0].state_dict(), tmp_path / "clip.pt")
    tower = build("open_clip:custom", str(tmp_path / "clip.pt"), options=small(image_size=48))
    assert tower.positional_embedding.shape[0] == 3 * 3 + 1
    assert tower(torch.rand(1, 3, 48, 48)).shape == (1, 16)


@pytest.mark.parametrize("form", ["timm's", "without its classifier", "in order"])
def test_weights_of_timms_network_alone_leave_the_projection_as_drawn(config, tmp_path, caplog, form):
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=0 if form.startswith("without") else 10)
    state = network.state_dict()
    if form == "in order":
        state = {f"layer{index}": value for index, value in enumerate(state.values())}
    torch.save(state, tmp_path / "imagenet.pt")
    torch.manual_seed(2)
    drawn = build(f"open_clip:{config}").head.proj.weight
    torch.manual_seed(2)
    with caplog.at_level(logging.INFO):
        tower = build(f"open_clip:{config}", str(tmp_path / "imagenet.pt"))
    for key, value in tower.trunk.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])
    assert torch.equal(tower.head.proj.weight, drawn)
    assert sum("stays as it was drawn" in message for message in caplog.messages) == 1


def test_weights_of_another_network_are_refused(config, tmp_path):
    torch.save(build("resnet8").state_dict(), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other.pt do not fit .*missing: "):
        build(f"open_clip:{config}", str(tmp_path / "other.pt"))


def test_an_unknown_tag_is_answered_with_the_nearest(config):
    for call in (build, build_text_tower, preprocessing_of):
        with pytest.raises(
            WeightsError, match=r"weights 'opennai' of open_clip:RN50: no such tag.*its tags: openai"
        ):
            call("open_clip:RN50", "opennai")
    with pytest.raises(WeightsError, match="its tags: none: give a file"):
        build(f"open_clip:{config}", "openai")


def test_a_tag_without_a_network_says_which_file_to_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(clip.open_clip(".pretrained").__dict__, "hf_hub_download", refused)
    small_tower = {"embed_dim": 16, "layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
    with pytest.raises(
        WeightsError, match=r"cannot be downloaded.*from timm/resnet50_clip.openai.*give that file"
    ) as told:
        build("open_clip:RN50-quickgelu", "openai", options=small_tower)
    assert "\n" not in str(told.value)


def refused(*args, **kwargs):
    raise OSError("Network is unreachable")


def test_weights_of_another_activation_are_told_of(monkeypatch, caplog, tmp_path):
    options = {"embed_dim": 16, "layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
    torch.save(build("open_clip:RN50", options=options).state_dict(), tmp_path / "tower.pt")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: tmp_path / "tower.pt")
    build("open_clip:RN50-quickgelu", "openai", options=options)
    assert not caplog.messages
    build("open_clip:RN50", "openai", options=options)
    assert "quick_gelu" in caplog.text


# Preprocessing


def test_preprocessing_is_that_of_the_tag_else_openais(config, tmp_path, caplog):
    tag, known = (
        open_clip.get_pretrained_cfg("ViT-B-16-SigLIP-256", "webli"),
        preprocessing_of("open_clip:ViT-B-16-SigLIP-256", "webli"),
    )
    assert (known.mean, known.std, known.interpolation) == (tag["mean"], tag["std"], tag["interpolation"])
    assert (known.normalisation_known, known.image_size, known.crop_pct) == (True, 256, None)
    openai = preprocessing_of("open_clip:RN50", "openai", {"image_size": 112})
    assert (openai.mean, openai.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert openai.view == {"image_size": 112, "crop_pct": 1.0, "interpolation": "bicubic"}
    none = preprocessing_of(f"open_clip:{config}", "none")
    assert (none.mean, none.std, none.normalisation_known, none.view) == (
        openai.mean,
        openai.std,
        False,
        {"image_size": SIZE},
    )
    torch.save(build(f"open_clip:{config}").state_dict(), tmp_path / "tower.pt")
    with caplog.at_level(logging.INFO):
        taken = chosen_preprocessing(f"open_clip:{config}", str(tmp_path / "tower.pt"))
    assert (taken.mean, taken.std) == (openai.mean, openai.std)
    assert "that of OpenAI's CLIP is taken" in caplog.text
    with caplog.at_level(logging.INFO):
        chosen_preprocessing("open_clip:ViT-B-16-SigLIP", str(tmp_path / "tower.pt"))
    assert "open_clip's own want mean (0.5, 0.5, 0.5)" in caplog.messages[-1]
    own = chosen_preprocessing(
        f"open_clip:{config}", str(tmp_path / "tower.pt"), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    assert (own.mean, own.std) == ((0.5,) * 3, (0.25,) * 3)


def test_a_config_file_of_the_hub_says_its_preprocessing(tmp_path):
    hub = {
        "model_cfg": CONFIG,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(hub))
    known = preprocessing_of(f"open_clip:{tmp_path}/open_clip_config.json", "none")
    assert (known.mean, known.std, known.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert known.normalisation_known


# Models of this project


@pytest.mark.parametrize("kind", ["conventional", "bcos"])
@pytest.mark.parametrize("vision", [TIMM, RN, {**VIT, "image_size": SIZE}], ids=["timm", "resnet", "vit"])
def test_an_image_tower_is_a_model_like_others(tmp_path, kind, vision):
    config = tmp_path / "my.json"
    config.write_text(json.dumps({**CONFIG, "vision_cfg": vision}))
    spec = ModelSpec(f"open_clip:{config}", (), SIZE, kind, task="embedding")
    model, images = assemble(spec).eval(), torch.rand(2, 6, SIZE, SIZE)
    models.save(tmp_path / "tower", model, spec)
    config.unlink()  # the model loads without its config file
    loaded, read = models.load(tmp_path / "tower")
    assert torch.equal(loaded(images), model(images))
    assert loaded(images).shape == (2, 16)
    assert (read.task, read.classes, read.name, read.zero_shot) == ("embedding", (), "open_clip:custom", {})
    assert loaded.logit_bias == 0.0


def test_conversion_preserves_the_embeddings_of_a_tower_of_timms(config):
    tower = build(f"open_clip:{config}")
    tower(torch.rand(8, 3, SIZE, SIZE))  # moves the running statistics
    spec = ModelSpec(
        f"open_clip:{config}",
        (),
        SIZE,
        "bcos",
        task="embedding",
        design={"b": 1.0, "bias": "keep", "stem_pool": "keep"},
    )
    model, images = assemble(spec, tower).eval(), torch.rand(2, 3, SIZE, SIZE)
    plain = assemble(dataclasses.replace(spec, kind="conventional"), tower).eval()
    wanted = plain(add_inverse(images))
    assert (model(add_inverse(images)) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_folders_of_earlier_versions_are_read_as_they_were(tmp_path):
    spec = ModelSpec("resnet8", ("a", "b"), 32, "bcos")
    models.save(tmp_path, assemble(spec), spec)
    before = digest(tmp_path)
    content = json.loads((tmp_path / "model.json").read_text())
    del content["zero_shot"]
    (tmp_path / "model.json").write_text(json.dumps(content))
    assert models.load(tmp_path)[1].zero_shot == {}
    assert len(before) == len(digest(tmp_path)) == 64


# Text towers


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return build_text_tower("custom", options={"embed_dim": 16, "text_cfg": TEXT}).eval()


def test_texts_are_encoded_in_order_whatever_the_batch(text):
    texts = [f"a photo of {count} dogs" for count in range(7)]
    one, many = text.encode(texts, batch_size=2), text.encode(texts)
    torch.testing.assert_close(one, many)
    torch.testing.assert_close(many, F.normalize(text(text.tokens(texts)), dim=-1))
    torch.testing.assert_close(many.norm(dim=1), torch.ones(7))
    assert (many.dtype, many.requires_grad) == (torch.float32, False)
    assert text(text.tokens(texts)).requires_grad
    assert text.encode([]).shape == (0, 16)


def test_a_long_text_is_cut_and_the_log_says_so_once(text, caplog, monkeypatch):
    monkeypatch.setattr(clip.text_tower, "_told_of_length", set())
    exact = " ".join(["dog"] * 10)  # with start and end tokens, as long as the context
    text.tokens([exact])
    assert not caplog.messages
    tokens = text.tokens(["a dog", f"{exact} dog dog", exact])
    text.tokens([f"{exact} cat"])
    assert len(caplog.messages) == 1
    assert "more than 12 tokens" in caplog.text
    assert (tokens.dtype, tokens.shape) == (torch.int64, (3, 12))
    assert torch.equal(tokens[1], tokens[2])


def test_an_empty_text_is_refused(text):
    with pytest.raises(ModelError, match="text 1 of 2 is empty"):
        text.encode(["a dog", " \n"])


def test_a_tokenizer_that_is_not_here_is_named(tmp_path):
    options = {"embed_dim": 16, "text_cfg": {**TEXT, "hf_tokenizer_name": "nobody/tokenizer"}}
    with pytest.raises(
        ModelError, match=r"tokenizer 'nobody/tokenizer'.*tokenizer.json.*nobody/tokenizer"
    ) as told:
        build_text_tower("custom", options=options).tokens(["a dog"])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("protocol", ["", "memory"])
def test_a_text_tower_lies_beside_a_model(text, tmp_path, protocol):
    spec = ModelSpec("resnet8", ("a", "b"), 32, "bcos")
    models.save(tmp_path, assemble(spec), spec)
    alone = digest(tmp_path)
    assert not has_text_tower(tmp_path)
    with pytest.raises(FileNotFoundError, match="no text tower in"):
        load_text_tower(tmp_path)
    save_text_tower(tmp_path, text)
    assert digest(tmp_path) != alone
    place = (
        publish(tmp_path, f"{protocol}://{tmp_path}", models.model_file_names(tmp_path))
        if protocol
        else tmp_path
    )
    assert has_text_tower(place)
    loaded = load_text_tower(place)
    assert loaded.config == text.config
    assert torch.equal(loaded.encode(["a dog"]), text.encode(["a dog"]))
    assert models.load(place)[1].classes == ("a", "b")
