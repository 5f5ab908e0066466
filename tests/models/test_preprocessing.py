"""Preprocessing comes from the publisher of the weights; the log says if the user's differs."""

import json
import logging

import pytest
import timm
import torch
import torchvision

from pipelines.bcos import IMAGENET_MEAN, IMAGENET_STD
from pipelines.models import WeightsError, build, chosen_preprocessing, preprocessing_of

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "tag", "registered"),
    [
        ("timm:vit_tiny_patch16_224", "pretrained", "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", "augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        ("timm:vit_base_patch16_224", "dino", "vit_base_patch16_224.dino"),
        ("timm:resnet50", "a1_in1k", "resnet50.a1_in1k"),
        ("timm:vit_base_patch16_clip_224", "openai", "vit_base_patch16_clip_224.openai"),
    ],
)
def test_timms_weights_have_the_numbers_of_their_config(name, tag, registered):
    config, known = timm.get_pretrained_cfg(registered), preprocessing_of(name, tag)
    assert (known.mean, known.std) == (config.mean, config.std)
    assert known.view == {
        "image_size": config.input_size[-1],
        "crop_pct": config.crop_pct, "interpolation": config.interpolation
    }  # fmt: skip


def test_a_config_in_the_options_counts():
    own = {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}
    known = preprocessing_of("timm:resnet18", "pretrained", {"pretrained_cfg_overlay": own})
    assert (known.mean, known.crop_pct) == (own["mean"], 1.0)


@pytest.mark.parametrize("tag", ["IMAGENET1K_V2", "DEFAULT", "ResNet50_Weights.IMAGENET1K_V2"])
def test_torchvisions_weights_have_the_numbers_of_their_transforms(tag):
    known, view = (
        preprocessing_of("resnet50", tag),
        torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms(),
    )
    assert (known.mean, known.std) == (tuple(view.mean), tuple(view.std))
    assert known.view == {
        "image_size": 224,
        "crop_pct": 224 / view.resize_size[0],
        "interpolation": "bilinear",
    }


def test_torchvisions_weights_bring_the_options_that_they_were_made_with():
    assert preprocessing_of("googlenet", "DEFAULT").options == {"transform_input": True, "aux_logits": False}
    assert preprocessing_of("vit_b_16", "IMAGENET1K_SWAG_E2E_V1").options == {"image_size": 384}
    assert preprocessing_of("vit_b_16", "IMAGENET1K_SWAG_E2E_V1").mean == (0.485, 0.456, 0.406)


def test_random_weights_and_files_have_imagenets(tmp_path, caplog):
    assert preprocessing_of("timm:vit_tiny_patch16_224", "none").mean == IMAGENET_MEAN
    torch.save(build("resnet8").state_dict(), tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO):
        taken = chosen_preprocessing("resnet8", str(tmp_path / "weights.pth"))
        chosen_preprocessing("timm:vit_tiny_patch16_224", str(tmp_path / "weights.pth"))
        chosen_preprocessing("resnet8", "none")
    assert (taken.mean, taken.std) == (IMAGENET_MEAN, IMAGENET_STD)
    first, second = caplog.messages
    assert "weights.pth of resnet8 do not say their normalisation: ImageNet's is taken" in first
    assert "timm's own want mean (0.5, 0.5, 0.5)" in second


def test_a_file_from_the_hub_has_its_config_beside_it(tmp_path):
    config = {
        "architecture": "vit_tiny_patch16_224",
        "pretrained_cfg": {"mean": HALF, "std": HALF, "input_size": [3, 96, 96]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    known = preprocessing_of("timm:vit_tiny_patch16_224", str(tmp_path / "model.safetensors"))
    assert (known.mean, known.std, known.image_size) == (HALF, HALF, 96)


def test_what_was_taken_is_said_in_one_line_and_what_contradicts_it_in_another(caplog):
    name, weights = "timm:vit_tiny_patch16_224", "pretrained"
    with caplog.at_level(logging.INFO):
        assert chosen_preprocessing(name, weights, image_size=224, eval_resize=249).mean == HALF
    taken, view = caplog.messages
    assert "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5), 224 px, crop 0.9, bicubic" in taken
    assert view.endswith("otherwise than here: interpolation bicubic (here bilinear)")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        taken = chosen_preprocessing(name, weights, mean=IMAGENET_MEAN, image_size=64)
    assert (taken.mean, taken.std) == (IMAGENET_MEAN, HALF)
    normalisation, view = caplog.messages
    assert normalisation.startswith(
        "model.mean (0.485, 0.456, 0.406) contradicts the weights pretrained of timm:vit_tiny"
    )
    assert "image_size 224 (here 64), crop_pct 0.9 (here 1.0), interpolation bicubic (here bilinear)" in view


def test_unknown_tags_are_named():
    for name, tag in (("resnet18", "NEWEST"), ("timm:resnet18", "newest"), ("resnet20", "DEFAULT")):
        with pytest.raises(WeightsError, match=f"weights '{tag}' of {name}"):
            preprocessing_of(name, tag)
