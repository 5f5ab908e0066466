import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipelines import params
from pipelines.params import leaves
from stages.tools.params import commented
from stages.tools.params_page import page

CLIP_DATA = ("pairs", "images", "labelled", "located")
ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "pipelines/recipes"


def composed(*overrides):
    with initialize_config_dir(os.fspath(RECIPES), version_base=None):
        config = compose("config", overrides=list(overrides))
    OmegaConf.resolve(config)
    return OmegaConf.to_container(config)


def changed(key, value):
    """The committed params with one value (or new key) changed."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    *path, last = key.split(".")
    inner = content
    for part in path:
        inner = inner[part]
    inner[last] = value
    return content


def test_the_committed_params_are_the_composed_default_recipe():
    assert (ROOT / "params.yaml").read_text() == commented(composed())


def test_dvc_writes_the_params_in_the_order_of_the_committed_ones():
    assert list(leaves(composed())) == list(leaves(yaml.safe_load((ROOT / "params.yaml").read_text())))


def test_the_page_of_the_params_is_current_and_describes_each():
    text = (ROOT / "docs/params.md").read_text()
    assert text == page(composed())
    assert [line for line in text.splitlines() if line.endswith("|  |")] == []


def test_only_data_sets_in_use_are_in_the_default_params():
    params = composed()
    named = {params["dataset"], params["guide"]["dataset"], *(params["clip"][key] for key in CLIP_DATA)}
    assert set(params["datasets"]) == named


def test_the_params_name_every_knob():
    committed = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert params.validate(committed).model_dump(mode="json") == committed


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (RECIPES / "recipe").glob("*.yaml")))
def test_every_recipe_is_valid(recipe):
    assert params.validate(composed(f"recipe={recipe}")).recipe == recipe


FIELDS = ("Paper", "Hardware", "Time", "Expected", "Command")


def header(recipe):
    """The fields of the comment at the top of a recipe: name -> texts."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), (RECIPES / f"recipe/{recipe}.yaml").read_text().splitlines()
    )
    fields, last = {}, []
    for line in lines:
        if found := re.fullmatch(r"# (\w+): {2,}(\S.*)", line):
            last = [found[2]]
            fields.setdefault(found[1], []).append(last)
        elif line.startswith("#    "):
            last.append(line.removeprefix("#").strip())
    return {name: [" ".join(text) for text in texts] for name, texts in fields.items()}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (RECIPES / "recipe").glob("*.yaml")))
def test_the_header_of_a_recipe_is_complete_and_its_commands_compose(recipe):
    fields = header(recipe)
    assert tuple(fields) == FIELDS
    assert any(word in fields["Expected"][0] for word in ("measured", "published", "end"))
    for command in fields["Command"]:
        words = shlex.split(command.translate(str.maketrans("", "", "[]")))
        assert words[:3] == ["dvc", "exp", "run"]
        overrides = [value for option, value in itertools.pairwise(words) if option == "-S"]
        assert params.validate(composed(*overrides)).recipe == recipe


@pytest.mark.parametrize("dataset", sorted(path.stem for path in (RECIPES / "dataset").glob("*.yaml")))
def test_every_data_set_is_valid(dataset):
    assert params.validate(composed(f"dataset={dataset}")).dataset == dataset


@pytest.mark.parametrize("guide", sorted(path.stem for path in (RECIPES / "guide").glob("*.yaml")))
@pytest.mark.parametrize("dataset", ["objects", "scenes"])
def test_guidance_brings_its_own_data_set(guide, dataset):
    found = params.validate(composed(f"guide={guide}", f"dataset={dataset}", "recipe=smoke"))
    assert found.guide.dataset == guide
    assert {guide, dataset} <= set(found.datasets)


def test_a_data_set_can_be_added_to_any_recipe():
    found = params.validate(
        composed("+source@datasets.captions=captions", "datasets.captions.root=my/photos")
    )
    assert found.datasets["captions"].root == "my/photos"


@pytest.mark.parametrize("model", sorted(path.stem for path in (RECIPES / "model").glob("*.yaml")))
def test_every_model_is_valid(model):
    assert params.validate(composed(f"model={model}"))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("bcosify.pretrained.gap_reordr", True, "bcosify.pretrained.gap_reordr: unknown key"),
        ("datasets.objects.sources", "x", "datasets.objects.sources: unknown key"),
        ("pretrain.optim.lr", "fast", "pretrain.optim.lr: .* valid number.*'fast'"),
        ("pretrain.optim.lr", -1, "pretrain.optim.lr: .* greater than 0.*-1"),
        ("bcosify.pretrained.b", 0.5, "bcosify.pretrained.b: .* greater than or equal to 1"),
        (
            "bcosify.pretrained.bias",
            "drop",
            "bcosify.pretrained.bias: .*'remove', 'fade', 'decay' or 'keep'.*'drop'",
        ),
        (
            "datasets.objects.correlation",
            {"train": 2},
            "datasets.objects.correlation.train: .* less than or equal to 1",
        ),
        ("datasets.objects.objects_per_image", [3, 1], "least .3. is above the most .1."),
        (
            "guide.dataset",
            "scenez",
            "guide.dataset: 'scenez' is not in datasets .it has objects, scenes.; others come with",
        ),
        (
            "guide.guided.localisation_weight",
            -1,
            "localisation_weight: .* greater than or equal to 0 .got -1",
        ),
        ("guide.guided.mixup", 0.2, "guide.guided.mixup: unknown key"),
        ("guide.guided.select", "f2", "guide.guided.select: .*'f1', 'epg', 'iou' or 'knee'"),
        ("dataset", "objectz", "dataset: 'objectz' is not in datasets .it has objects, scenes."),
        ("training.workers", -1, r"training.workers: .*greater than or equal to 0"),
        ("training.workers", "x", r"^params.yaml: training.workers: [^\n]*$"),
        ("training.workers", [4, 2], r"the least .4. is above the most .2."),
        ("training.accumulate", 0, r"training.accumulate: .*greater than 0"),
        ("data.rand_augment", 31, r"data.rand_augment: .*less than or equal to 30"),
        ("bcosify.starts", [], "bcosify.starts: .*at least 1"),
        ("evaluate.smooth", 4, "evaluate.smooth: must be odd .got 4."),
        ("search.metrics", ["accuracy"], r"search.metrics.0: .*'\^val/'.*'accuracy'"),
        (
            "search.space",
            [{"key": "bcosify.pretrained.bb", "choice": [1]}],
            "search.space: 'bcosify.pretrained.bb' is not in",
        ),
        (
            "search.space",
            [{"key": "pretrain.optim.lr", "uniform": [1, 2]}],
            "'pretrain.optim.lr' does not change what bcosify@pretrained",
        ),
        (
            "search.space",
            [{"key": "bcosify.pretrained.b", "uniform": [0.5, 2]}],
            "space: bcosify.pretrained.b: .*1 .got 0.5.",
        ),
        (
            "search.space",
            [{"key": "bcosify.pretrained.b", "uniform": [2, 2]}],
            "the least .2. must be below the most .2.",
        ),
        (
            "search.space",
            [{"key": "bcosify.pretrained.bias", "choice": ["keep", "drop"]}],
            "bias: .*'remove', .*'drop'",
        ),
        (
            "search.space",
            [{"key": "seed", "choice": [1], "when": {"data.augment": "none"}}],
            "when names 'data.augment'",
        ),
        (
            "search.space",
            [{"key": "seed", "choice": [1], "uniform": [1, 2]}],
            "exactly one of choice, uniform and loguniform",
        ),
        (
            "search.space",
            [{"key": "bcosify.pretrained.optim.warmup_steps", "uniform": [0, 9]}],
            "warmup_steps: .*valid integer.*2.86",
        ),
        ("search.shots", 0, "search.shots: .*greater than 0"),
        ("search.workers", 2, "search: asha: trials that train on Ray workers run to their end"),
        ("pretrain.optim.lr", float("inf"), "pretrain.optim.lr: .*finite"),
        ("datasets.objects.counts", {"train": 5, "val": 5}, "counts: test missing"),
        ("datasets.voc", {"source": "voc2007", "difficlt": False}, "datasets.voc.difficlt: unknown key"),
        (
            "datasets.coco",
            {"source": "coco2014", "crowd": "keep"},
            "datasets.coco.crowd: .*'label', 'ignore' or 'box'.*'keep'",
        ),
        (
            "datasets.birds",
            {"source": "waterbirds", "variant": 90},
            "datasets.birds.variant: .*95 or 100.*90",
        ),
        (
            "datasets.voc",
            {"source": "voc2007", "on_bad_box": "drop"},
            "datasets.voc.on_bad_box: .*'raise' or 'skip'.*'drop'",
        ),
    ],
)
def test_a_bad_value_is_one_line_with_key_value_and_what_is_allowed(key, value, told):
    with pytest.raises(params.ParamsError, match=told):
        params.validate(changed(key, value), "params.yaml")


def test_compiling_and_checkpointing_together_are_refused_in_one_line():
    content = changed("training.compile", True)
    content["training"]["checkpoint_activations"] = True
    with pytest.raises(
        params.ParamsError, match=r"^params.yaml: training: compile and checkpoint_activations: choose[^\n]*"
    ):
        params.validate(content, "params.yaml")


def test_a_missing_key_and_a_broken_file_are_named(tmp_path):
    content = changed("seed", 0)
    del content["pretrain"]["optim"]["epochs"]
    with pytest.raises(params.ParamsError, match=r"pretrain\.optim\.epochs: missing"):
        params.validate(content)
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(params.ParamsError, match=r"params\.yaml"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("mode", ["scheduled", "learned"])
def test_a_space_that_does_not_fit_the_other_params_matters_to_the_search_alone(mode):
    found = params.validate(changed("bcosify.pretrained.b_mode", mode))
    if mode == "scheduled":
        params.check_space(found)
    else:
        with pytest.raises(
            params.ParamsError,
            match=r"^params: search.space: bcosify.pretrained: b: a learned B .*, not 1\.5",
        ):
            params.check_space(found)


# Renames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("former", "value", "today"),
    [
        ("pretrain.lr", 0.1, "pretrain.optim.lr"),
        ("training.storage", "s3://bucket", "storage.root"),
        ("clip.vit.bcosify.clip_value", 1, "clip.vit.bcosify.optim.clip_value"),
    ],
)
def test_a_param_from_before_a_rename_names_the_new_one(former, value, today):
    content = changed(former, value)
    with pytest.raises(params.ParamsError) as told:
        params.validate(content, "params.yaml")
    assert str(told.value) == f"params.yaml: {former}: renamed to {today}"
    known = params.validate(yaml.safe_load((ROOT / "params.yaml").read_text()))
    with pytest.raises(params.ParamsError, match=f"^params: {former}: renamed to {today}$"):
        params.replaced(known, {former: value})


def test_params_from_before_the_optimisers_group_name_each_new_key_and_nothing_else():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    knobs = content["distill"]["kd"].pop("optim")
    content["distill"]["kd"] |= knobs
    with pytest.raises(params.ParamsError) as told:
        params.validate(content, "params.yaml")
    lines = [f"params.yaml: distill.kd.{knob}: renamed to distill.kd.optim.{knob}" for knob in knobs]
    assert sorted(str(told.value).splitlines()) == sorted(lines)


@pytest.mark.parametrize(
    "dimension",
    [
        {"key": "bcosify.pretrained.lr", "loguniform": [0.001, 0.1]},
        {"key": "bcosify.pretrained.b", "choice": [1, 2], "when": {"bcosify.pretrained.lr": 0.1}},
    ],
)
def test_a_dimension_of_a_search_from_before_a_rename_names_the_new_one(dimension):
    line = "params: search: space: bcosify.pretrained.lr: renamed to bcosify.pretrained.optim.lr"
    with pytest.raises(params.ParamsError, match=f"^{line}$"):
        params.validate(changed("search.space", [dimension]))


def test_a_rename_leads_to_a_param_that_exists():
    known = leaves(composed())
    for key in known:
        assert params.renamed(key) is None
        former = key.replace(".optim.", ".")
        if former != key:
            assert params.renamed(former) == key
    assert "storage.root" in known
