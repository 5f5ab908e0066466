"""Public names, which code outside this repository calls, keep their names and positional arguments."""

import importlib
import inspect

import pytest

SIGNATURES = {
    "pipelines.bcos": {
        "add_inverse": "images",
        "convert": "model *mean *std",
        "bcosify": "model *b *bias *norm *stem_pool *gap_reorder *activation *logit_bias *mean *std",
        "BcosConv2d": "in_channels out_channels kernel_size stride padding dilation groups "
        "bias b max_out normalize_weight",
        "BcosLinear": "in_features out_features bias b max_out normalize_weight",
        "explanation_mode": "model",
        "dynamic_weights": "model images targets create_graph",
        "contribution_map": "images weights",
        "rgba": "images weights smooth percentile",
    },
    "pipelines.models": {"build": "name weights"},
    "pipelines.attribution": {"attribute": "model images targets *method *layer *resize"},
    "pipelines.losses": {
        "uniform_off_label_bce": "logits targets off_label",
        "distillation_loss": "student_logits teacher_logits temperature",
        "explanation_loss": "student_maps teacher_maps",
        "energy_loss": "attributions masks",
        "l1_loss": "attributions masks",
        "rrr_loss": "attributions masks",
        "ppce_loss": "attributions masks",
        "siglip_loss": "features targets scale bias",
    },
    "pipelines.metrics": {
        "energy_pointing_game": "attributions masks",
        "attribution_iou": "attributions masks",
        "grid_pointing_game": "",
        "agreement": "student_logits teacher_logits",
    },
}
NAMES = [(module, name) for module, names in SIGNATURES.items() for name in names]
DEFAULTS = {
    "bcosify": {
        "b": 2.0,
        "bias": "remove",
        "norm": "uncentered",
        "stem_pool": "average",
        "gap_reorder": True,
        "activation": "keep",
    },
    "dynamic_weights": {"create_graph": False},
    "rgba": {"smooth": 15, "percentile": 99.5},
    "BcosConv2d": {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "bias": False,
        "b": 2.0,
        "max_out": 1,
    },
    "BcosLinear": {"bias": False, "b": 2.0},
    "attribute": {"method": "bcos", "layer": None, "resize": True},
    "distillation_loss": {"temperature": 1.0},
}


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_takes_the_arguments_that_it_always_took(module, name):
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    wanted = SIGNATURES[module][name].split()
    positional = [argument for argument in wanted if not argument.startswith("*")]
    assert list(parameters)[: len(positional)] == positional
    for keyword in (argument.removeprefix("*") for argument in wanted if argument.startswith("*")):
        assert parameters[keyword].kind == inspect.Parameter.KEYWORD_ONLY
    assert {key: parameters[key].default for key in DEFAULTS.get(name, {})} == DEFAULTS.get(name, {})
    new = [key for key in parameters if key not in {argument.removeprefix("*") for argument in wanted}]
    assert all(
        parameters[key].default is not inspect.Parameter.empty
        or parameters[key].kind == inspect.Parameter.VAR_KEYWORD
        for key in new
        if wanted
    )
