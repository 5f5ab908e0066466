"""open_clip's image towers, shrunk: `convert` keeps embeddings; W(x) is the Jacobian at fixed factors."""

import copy
import pickle
import subprocess
import sys

import open_clip.model
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import Attention, LayerNorm, LayerNormFp32
from torch import nn

from pipelines.bcos import (
    BcosConv2d,
    BcosLinear,
    ConversionError,
    add_inverse,
    bcosify,
    convert,
    dynamic_weights,
    layer_b,
    set_b,
)
from pipelines.bcos.audit import audit
from pipelines.bcos.layers import clamp_b
from tests.support.families import (
    check_conversion,
    check_frozen_jacobian,
    normalised,
    pictures,
    relative,
    settle,
    shake,
)

RN = {"layers": [2, 1, 1, 1], "width": 8, "head_width": 32, "image_size": 64}
VIT = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": 32}
POOLER = {**VIT, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
CUSTOM = dict.fromkeys(("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True)
TIMM = {"image_size": 64, "timm_model_name": "test_efficientnet", "timm_pool": "avg"}
CONVOLUTIONAL = {"timm", "timm mlp", "timm classifier"}

TOWERS = {
    "RN": RN,
    "ViT": VIT,
    "ViT average": {**VIT, "pool_type": "avg", "no_ln_pre": True},
    "ViT norm after pool": {
        **VIT,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "pos_embed_type": "sin_cos_2d",
    },
    "ViT layer scale, patch dropout": {**VIT, "ls_init_value": 0.1, "patch_dropout": 0.5},
    "ViT custom blocks": {**VIT, **CUSTOM},
    "ViT attentional pool": {**POOLER, "attentional_pool": True},
    "ViT attentional pool, average": {**POOLER, "attentional_pool": True, "pool_type": "avg"},
    "ViT parallel": {**POOLER, "attentional_pool": "parallel"},
    "ViT cascade": {**POOLER, "attentional_pool": "cascade"},
    "timm": {**TIMM, "timm_proj": "linear"},
    "timm mlp": {**TIMM, "timm_proj": "mlp"},
    "timm classifier": {**TIMM, "timm_proj": ""},
    "timm SigLIP": {
        **TIMM,
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_pool": "map",
        "timm_proj": "none",
    },
}
# open_clip's code for these needs an embedding as wide as the tokens
WIDTHS = {"ViT parallel": 24, "ViT cascade": 24}


def tower(name, **changes):
    """The tower with random weights and embeddings of 16 features."""
    torch.manual_seed(0)
    config = {**TOWERS[name], **changes}
    return shake(open_clip.model._build_vision_tower(WIDTHS.get(name, 16), config, quick_gelu=name == "ViT"))


def images_for(name):
    return pictures(2, TOWERS[name]["image_size"])


@pytest.mark.parametrize("name", [name for name in TOWERS if name not in WIDTHS])
def test_conversion_preserves_the_embedding(name):
    check_conversion(tower(name), images_for(name))


@pytest.mark.parametrize("name", WIDTHS)
def test_a_pool_of_one_query_gives_an_embedding_without_the_axis_of_queries(name):
    source, images = tower(name).eval(), images_for(name)
    with torch.no_grad():
        torch.testing.assert_close(
            convert(source)(add_inverse(images)), source(normalised(images))[:, 0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", TOWERS)
def test_dynamic_weights_are_the_jacobian_with_frozen_factors(name):
    explained = check_frozen_jacobian(tower(name), images_for(name), tower=True)
    assert audit(explained, add_inverse(images_for(name).double())) == []


@pytest.mark.parametrize("name", TOWERS)
def test_without_biases_positions_and_class_tokens_pixels_carry_the_whole_embedding(name):
    choices = {"position_embedding": "keep" if name in CONVOLUTIONAL else "remove"}
    network = bcosify(tower(name), **choices).double()
    images, targets = add_inverse(images_for(name).double()), torch.tensor([3, 5])
    settle(network, images)
    embeddings, weights = dynamic_weights(network, images, targets)
    explained = (weights * (images - network.mean[:, None, None])).sum((1, 2, 3))
    assert relative(explained, embeddings[range(2), targets]) <= 1e-6


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_has_no_logit_bias_and_no_classifier(name):
    network = bcosify(tower(name))
    assert network.logit_bias == 0
    assert not network.design["gap_reorder"]
    with pytest.raises(ConversionError, match="gap_reorder"):
        bcosify(tower(name), gap_reorder=True)


# The projection ---------------------------------------------------------------------------------------------

PROJECTIONS = {
    "RN": "attnpool.c_proj",
    "ViT": "proj",
    "timm": "head.proj",
    "timm mlp": "head.mlp.fc2",
    "timm classifier": "trunk.classifier",
}


@pytest.mark.parametrize(("name", "path"), PROJECTIONS.items())
@pytest.mark.parametrize("b_mode", ["fixed", "scheduled", "learned"])
def test_a_linear_projection_stays_linear_whatever_the_other_layers_are(name, path, b_mode):
    network = bcosify(tower(name), b_mode=b_mode, max_out=2)
    if b_mode == "scheduled":
        set_b(network, 1.5)
    clamp_b(network)
    projection = network.body.get_submodule(path)
    assert not isinstance(projection, BcosLinear)
    assert f"body.{path}" not in layer_b(network)
    x = torch.randn(3, projection.in_features)
    torch.testing.assert_close(projection(-2 * x), -2 * projection(x))


@pytest.mark.parametrize(("name", "path"), PROJECTIONS.items())
def test_a_bcos_projection_has_the_exponent_of_the_other_layers_and_the_weights_of_the_original(name, path):
    source = tower(name)
    network = bcosify(source, projection="bcos", b=1.5)
    projection = network.body.get_submodule(path)
    assert isinstance(projection, BcosLinear)
    assert layer_b(network)[f"body.{path}"] == 1.5
    original = source.proj.T if name == "ViT" else source.get_submodule(path).weight
    assert torch.equal(projection.weight, original)
    assert network.design["projection"] == "bcos"


@pytest.mark.parametrize("name", ["RN", "ViT"])
def test_a_bcos_projection_is_explained(name):
    check_frozen_jacobian(tower(name), images_for(name), tower=True, projection="bcos")


def test_a_projection_that_is_not_there_cannot_become_bcos():
    with pytest.raises(ConversionError, match="nothing in TimmModel for projection='bcos'"):
        bcosify(tower("timm SigLIP"), projection="bcos")


def test_a_frozen_tower_stays_frozen():
    source = tower("ViT")
    source.lock()
    assert not any(parameter.requires_grad for parameter in bcosify(source).parameters())


# Parts ------------------------------------------------------------------------------------------------------


def test_the_attention_pool_keeps_the_names_of_the_original_and_q_k_v_stay_linear():
    source = tower("RN")
    pool = convert(source).body.attnpool
    assert pool.state_dict().keys() == source.attnpool.state_dict().keys()
    assert all(type(layer) is nn.Linear for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj))
    assert isinstance(convert(source).body.conv1, BcosConv2d)


@pytest.mark.parametrize("bias", ["keep", "remove"])
def test_the_attention_pool_has_the_output_and_the_gradients_of_the_original(bias):
    torch.manual_seed(0)
    source = AttentionPool2d(3, 24, 4, 10).double()
    if bias == "remove":
        for layer in (source.q_proj, source.k_proj, source.v_proj, source.c_proj):
            nn.init.zeros_(layer.bias)
    network = bcosify(nn.Sequential(nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24), source), bias=bias)
    pool, x = network.body[2], torch.randn(2, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for each in (source, pool):
        y = each(x)
        parameters = dict(each.named_parameters())
        gradients = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
        results.append({"output": y, **dict(zip(["input", *parameters], gradients, strict=True))})
    for name, found in results[1].items():
        torch.testing.assert_close(found, results[0][name], rtol=1e-9, atol=1e-9)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["RN", "ViT custom blocks"])
def test_a_compiled_tower_has_the_gradients_of_the_eager_one(name):
    network, images = bcosify(tower(name), position_embedding="remove"), add_inverse(images_for(name))
    settle(network, images).train()
    compiled = torch.compile(lambda x: network(x).square().sum(), fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        *(
            torch.autograd.grad(loss, list(network.parameters()))
            for loss in (compiled(images), network(images).square().sum())
        ),
        strict=True,
    ):
        assert relative(found, expected) <= 1e-4


def test_a_resnet_without_position_embedding_takes_images_of_any_size():
    network = bcosify(tower("RN"), position_embedding="remove")
    assert network(add_inverse(pictures(1, 96))).shape == (1, 16)
    assert not any("embedding" in name for name in network.state_dict())


def test_scaled_cosine_attention_compares_directions():
    torch.manual_seed(0)
    # the reference is written out here, because open_clip's own forward fails: its `bmm` takes no heads
    source = shake(Attention(24, 3, scaled_cosine=True))
    x = torch.randn(2, 7, 24)
    q, k, v = (
        F.linear(x, source.in_proj_weight, source.in_proj_bias).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    )
    cosines = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    mixed = (cosines * source.logit_scale.exp()).softmax(-1) @ v
    attention = convert(nn.Sequential(nn.Conv2d(3, 4, 1), source)).body[1]
    torch.testing.assert_close(
        attention(x), source.out_proj(mixed.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5
    )


def test_norms_give_the_type_that_they_take():
    for norm in (LayerNorm(4), LayerNormFp32(4)):
        shake(norm)
        converted = convert(nn.Sequential(nn.Conv2d(3, 4, 1), norm)).body[1]
        x = torch.randn(2, 4).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(converted(x), norm(x))
    torch.testing.assert_close(converted(x), norm(x))  # in float32, from bfloat16


@pytest.mark.parametrize(
    "changes", [{"output_tokens": True}, {"attentional_pool": True, "pool_type": "none"}]
)
def test_a_tower_that_gives_tokens_is_refused(changes):
    with pytest.raises(
        ConversionError, match="output_tokens=False and a pool_type of 'tok' or 'avg'"
    ) as told:
        bcosify(tower("ViT attentional pool", **changes))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["RN", "ViT custom blocks", "timm SigLIP"])
def test_a_converted_tower_can_be_copied_and_pickled(name, copied):
    model, images = bcosify(tower(name)).eval(), add_inverse(images_for(name))
    torch.testing.assert_close(copied(model)(images), model(images))


@pytest.mark.processes
def test_this_project_is_imported_without_open_clip():
    code = "import sys; sys.modules['open_clip'] = None; import pipelines.bcos, pipelines.models"
    subprocess.run([sys.executable, "-c", code], check=True)
