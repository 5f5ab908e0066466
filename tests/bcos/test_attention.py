"""Converted attention modules give torch's outputs in every layout, and hold the attention matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.bcos import BcosLinear, Conversion, ConversionError, Holdable, explanation_mode
from pipelines.bcos.attention import BcosMultiheadAttention
from pipelines.bcos.convert import _convert

DOUBLE = torch.float64


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dtype=DOUBLE, **options).eval()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return module


def converted(module):
    return _convert(module, Conversion()).eval()


def sequence(*shape):
    return torch.randn(*shape, 8, dtype=DOUBLE)


MASKS = {
    "none": {},
    "boolean": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "float": {"attn_mask": torch.linspace(-1, 1, 25, dtype=DOUBLE).view(5, 5)},
    # per head; no token is masked from itself, so that no row is masked as a whole
    "of each head": {"attn_mask": (torch.rand(6, 5, 5) > 0.7) & ~torch.eye(5).bool()},
    "padding": {"key_padding_mask": torch.arange(5) >= torch.tensor([5, 3, 1])[:, None]},
    "float padding": {"key_padding_mask": torch.linspace(-1, 1, 15, dtype=DOUBLE).view(3, 5)},
    "both": {
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "key_padding_mask": torch.arange(5) >= torch.tensor([5, 4, 3])[:, None],
    },
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=["no", "mean", "heads"]
)
def test_outputs_and_weights_are_those_of_torch(batch_first, mask, weights):
    module = attention(batch_first=batch_first)
    x = sequence(3, 5) if batch_first else sequence(5, 3)
    options = MASKS[mask] | weights
    expected = module(x, x, x, **options)
    found = converted(module)
    for one, other in zip(found(x, x, x, **options), expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other)
    with explanation_mode(found):
        torch.testing.assert_close(found(x, x, x, **options)[0], expected[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 6}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_cross_attention_with_and_without_a_batch(options, batched):
    module = attention(batch_first=True, **options)
    shapes = [(4, 8), (5, options.get("kdim", 8)), (5, options.get("vdim", 8))]
    inputs = [torch.randn(*((3,) if batched else ()), *shape, dtype=DOUBLE) for shape in shapes]
    padding = {"key_padding_mask": torch.arange(5) >= (torch.tensor([5, 3, 1])[:, None] if batched else 3)}
    expected = module(*inputs, **padding)
    for one, other in zip(converted(module)(*inputs, **padding), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("need_weights", [True, False])
def test_only_v_depends_on_the_input_where_the_matrix_is_held(need_weights):
    module, x = converted(attention(batch_first=True)), sequence(3, 5).requires_grad_()
    assert isinstance(module, BcosMultiheadAttention)
    assert isinstance(module.out_proj, BcosLinear)
    with explanation_mode(module):
        (held,) = torch.autograd.grad(module(x, x, x, need_weights=need_weights)[0].square().sum(), x)
    matrix = module(x.detach(), x.detach(), x.detach(), average_attn_weights=False)[1]
    v = (
        F.linear(x, module.in_proj_weight[16:], module.in_proj_bias[16:])
        .unflatten(-1, (2, 4))
        .transpose(1, 2)
    )
    mixed = (matrix @ v).transpose(1, 2).flatten(2)
    (expected,) = torch.autograd.grad(module.out_proj(mixed).square().sum(), x)
    torch.testing.assert_close(held, expected)
    (ordinary,) = torch.autograd.grad(module(x, x, x)[0].square().sum(), x)
    assert not torch.allclose(held, ordinary, rtol=1e-2)


def test_dropout_takes_entries_of_the_matrix_in_training_alone():
    module, x = converted(attention(batch_first=True, dropout=0.5)), sequence(3, 5)
    weights = module.train()(x, x, x, average_attn_weights=False)[1]
    assert 0.2 < (weights == 0).double().mean() < 0.8
    assert torch.equal(module.eval()(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize(
    "options", [{"norm_first": True}, {"norm_first": False, "activation": "gelu"}, {"activation": nn.GELU()}]
)
def test_encoders_of_torch_are_converted_without_their_fused_inference(options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=DOUBLE, **options)
    module = nn.TransformerEncoder(
        layer, 2, norm=nn.LayerNorm(8, dtype=DOUBLE), enable_nested_tensor=False
    ).eval()
    x, mask = sequence(3, 5), torch.ones(5, 5).triu(1).bool()
    with torch.no_grad():
        expected = module(x, mask=mask)
        found = converted(module)
        torch.testing.assert_close(found(x, mask=mask), expected)
        for linear in [part for part in found.modules() if isinstance(part, BcosLinear)]:
            linear._configure(2.0, 1, False)
        # torch's fused inference would ignore B, and the outputs would be equal
        assert not torch.allclose(found(x, mask=mask), expected, rtol=1e-2)
    assert sum(isinstance(part, Holdable) for part in found.modules()) == 2 * (1 + 3 + 2) + 1 + 2 * (
        "activation" in options
    )


def test_what_cannot_be_converted_is_refused_in_one_line():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(
            ConversionError, match="'encoder': a MultiheadAttention with add_bias_kv or add_zero_attn"
        ):
            _convert(attention(**options), Conversion(path="encoder"))
    with pytest.raises(ConversionError, match="activation of this TransformerEncoderLayer is a function"):
        _convert(nn.TransformerEncoderLayer(8, 2, activation=torch.tanh), Conversion())
    x = sequence(3, 5)
    with pytest.raises(ValueError, match="is_causal"):
        converted(attention())(x, x, x, is_causal=True)
