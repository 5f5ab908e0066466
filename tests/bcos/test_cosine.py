"""Explained cosines: contributions sum to them, and published variants equal formulas with `detach`."""

import math

import open_clip.model
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.bcos import (
    BcosLinear,
    ConversionError,
    add_inverse,
    bcosify,
    dynamic_weights,
    explanation_mode,
)
from pipelines.bcos.audit import audit
from pipelines.bcos.cosine import CosineHead, UnpooledHead, unpooled
from tests.support.families import pictures, relative, settle, shake

RN = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64}
VIT = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 64}


def tower(config=RN, **choices):
    """A B-cosified tower with 16 features and no constants in float64, and a batch of images."""
    torch.manual_seed(0)
    images = add_inverse(pictures(3, 64).double())
    source = shake(open_clip.model._build_vision_tower(16, config))
    network = bcosify(source, **{"position_embedding": "remove", **choices}).double()
    return settle(network, images), images


def texts(count=4):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def contributions(network, images, weights):
    return (weights * (images - network.mean[:, None, None])).sum((1, 2, 3))


@pytest.mark.parametrize("config", [RN, VIT])
@pytest.mark.parametrize("hold_norm", [True, False])
def test_contributions_sum_to_the_cosine_if_the_norm_is_held_and_to_0_if_it_is_not(config, hold_norm):
    network, images = tower(config)
    model, targets = nn.Sequential(network, CosineHead(texts(), hold_norm=hold_norm)), torch.tensor([0, 2, 3])
    cosines, weights = dynamic_weights(model, images, targets)
    torch.testing.assert_close(cosines, F.cosine_similarity(network(images)[:, None], texts()[None], dim=-1))
    sums = contributions(network, images, weights)
    expected = cosines[range(3), targets] if hold_norm else torch.zeros(3).double()
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-6)
    assert weights.abs().sum() > 1e-2
    assert (audit(model, images) == []) == hold_norm


def test_a_differentiated_norm_equals_the_formula():
    network, images = tower()
    x = images.clone().requires_grad_()
    with explanation_mode(network):
        embeddings = network(x)
        cosines = (embeddings @ F.normalize(texts(), dim=-1).T) / embeddings.norm(dim=-1, keepdim=True)
        (expected,) = torch.autograd.grad(cosines[:, 1].sum(), x)
    model = nn.Sequential(network, CosineHead(texts(), hold_norm=False))
    _, weights = dynamic_weights(model, images, torch.ones(3, dtype=torch.long))
    assert relative(weights, expected) <= 1e-5


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("position_embedding", ["keep", "remove"])
@pytest.mark.parametrize("p", [1, 2, 0, 3.5])
def test_unpooled_logits_and_their_weights_equal_the_formulas(p, position_embedding, create_graph):
    network, images = tower(position_embedding=position_embedding)
    pool, features, targets = network.body.attnpool, [], torch.tensor([0, 2, 3])
    network.body.layer4.register_forward_hook(lambda *call: features.append(call[-1]))
    x = images.clone().requires_grad_()
    with explanation_mode(network):
        network(x)
        places = features[0].flatten(2).transpose(1, 2)
        if position_embedding == "keep":
            places = places + pool.positional_embedding[1:].detach()
        values = places @ pool.v_proj.weight.T
        linear = values @ pool.c_proj.weight.T
        embeddings = linear * (linear.abs() / values.norm(dim=-1, keepdim=True)).detach()
        t = (embeddings / embeddings.norm(dim=-1, keepdim=True).detach()) @ F.normalize(texts(), dim=-1).T
        logits = t.max(1).values if p == 0 else (t * t.abs().pow(p - 1).detach()).mean(1)
        (expected,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), x)
    network.body.layer4._forward_hooks.clear()

    model = unpooled(network, texts(), p)
    found, weights = dynamic_weights(model, images, targets, create_graph=create_graph)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-8)
    assert relative(weights.detach(), expected) <= 1e-5
    if position_embedding == "remove":
        torch.testing.assert_close(
            contributions(model, images, weights), found[range(3), targets], rtol=0, atol=1e-6
        )


def test_unpooling_leaves_the_tower_as_it_was():
    network, images = tower()
    before, keys = network(images), network.state_dict().keys()
    model = unpooled(network, texts())
    assert isinstance(model.body.attnpool, UnpooledHead)
    assert network.state_dict().keys() == keys
    torch.testing.assert_close(network(images), before)
    assert type(network.body.attnpool.c_proj) is nn.Linear


def test_the_output_projection_of_an_unpooled_tower_has_the_exponent_of_the_tower():
    projections = [
        unpooled(tower(projection=choice, b=1.5)[0], texts()).body.attnpool.projection
        for choice in ("linear", "bcos")
    ]
    assert all(isinstance(layer, BcosLinear) and layer.b == 1.5 for layer in projections)


def test_cosines_keep_their_digits_under_autocast():
    head, embeddings = CosineHead(texts().float(), scale=100.0), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(embeddings), head(embeddings.double()).float(), rtol=1e-5, atol=1e-4)
    assert head.bfloat16()(embeddings.bfloat16()).dtype == torch.float32


def test_texts_are_saved_with_the_head_and_have_norm_1():
    head = CosineHead(texts() * 5, scale=10.0)
    torch.testing.assert_close(head.state_dict()["texts"].norm(dim=-1), torch.ones(4).double())
    torch.testing.assert_close(head(texts()).diagonal(), torch.full((4,), 10.0).double())


def test_an_image_whose_embedding_is_0_has_cosines_of_0():
    embeddings = torch.zeros(1, 16, dtype=torch.float64, requires_grad=True)
    cosines = CosineHead(texts())(embeddings)
    assert not cosines.any()
    assert torch.autograd.grad(cosines.sum(), embeddings)[0].isfinite().all()


@pytest.mark.parametrize("scale", [math.nan, 0.0, -1.0, math.inf])
def test_a_scale_that_is_no_positive_number_is_an_error(scale):
    with pytest.raises(ValueError, match="scale of cosines is a finite number above 0"):
        CosineHead(texts(), scale)


def test_other_bad_arguments_are_errors():
    with pytest.raises(ValueError, match=r"\(K, D\), not \(16,\)"):
        CosineHead(texts()[0])
    network, _ = tower()
    for p in (0.5, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"0 \(the best place\) or at least 1"):
            unpooled(network, texts(), p)
    with pytest.raises(ConversionError, match="one attention pool"):
        unpooled(tower(VIT)[0], texts())
