"""The command that writes docs/architectures.md, on a sample of its networks at small size."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.architectures import CASES, LIMIT, Case, document, measure, unexplained_share
from pipelines.bcos import bcosify
from pipelines.models import build
from tests.support.families import pictures, settle


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SAMPLE = ["resnet20", "timm:mobilenetv3_small_100", "timm:convnextv2_atto", "vitc_ti"]


def test_a_sample_is_as_the_page_wants_it():
    cases = [case for case in CASES if case.name in SAMPLE]
    results = [measure(dataclasses.replace(case, size=32), rounds=1) for case in cases]
    assert [found.case.name for found in results] == SAMPLE
    assert [found.failures() for found in results] == [[]] * len(SAMPLE)
    assert [found.case.name for found in results if found.constant] == ["vitc_ti"]
    page = document(results, "the command", 1)
    assert all(f"| {name.removeprefix('timm:')}" in page for name in SAMPLE)


def test_the_page_has_every_family_of_the_libraries_and_names_no_architecture_twice():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 30
    families = " ".join(case.family for case in CASES)
    for family in (
        *(
            "ResNet",
            "ResNeXt",
            "Wide ResNet",
            "DenseNet",
            "VGG",
            "MobileNet v2",
            "MobileNet v3",
            "EfficientNet",
            "RegNet",
        ),
        *(
            "ConvNeXt",
            "ViT",
            "Swin",
            "MaxViT",
            "DeiT",
            "ResNet-D",
            "ConvNeXt v2",
            "EfficientFormer",
            "SimpleViT",
            "ViT-C",
        ),
    ):
        assert family in families


def test_what_is_not_as_it_should_be_is_said():
    found = measure(Case("resnet20", "ResNet", 32), rounds=1)
    worse = dataclasses.replace(
        found, difference=2e-4, share=1e-3, findings=["evaluation: silu in the forward of Block at 'b'"]
    )
    assert worse.failures() == [
        *worse.findings,
        "convert changes the logits by 2.0e-04",
        "a share of 1.0e-03 is unexplained",
    ]
    assert dataclasses.replace(worse, constant=True).failures()[1:] == [
        "convert changes the logits by 2.0e-04"
    ]


def test_a_share_is_unexplained_where_biases_are_kept():
    torch.manual_seed(0)
    source = build("resnet20", num_classes=10)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    images = torch.cat([pictures(4, 32), 1 - pictures(4, 32)], 1)
    share, constant = unexplained_share(settle(bcosify(source), images), images)
    assert share <= LIMIT
    assert not constant
    share, constant = unexplained_share(settle(bcosify(source, bias="keep"), images), images)
    assert share > 0.01
    assert constant
