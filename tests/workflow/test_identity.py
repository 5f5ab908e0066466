"""The code and params that `dvc.yaml` lists for a stage are those that it runs and that name its runs."""

import shutil
from pathlib import Path

import pytest
import yaml

from pipelines.params import DataParams, load
from pipelines.workflow import identity
from pipelines.workflow.identity import ROOT, code_digest, code_files

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
COMPUTED = [name for name, stage in STAGES.items() if not stage.get("always_changed")]
TRAINED = ("pretrain", "bcosify", "distill", "classify", "guide", "image_text", "clip")
# Stage -> key of its data params; `data` for the other stages.
DATA = {
    "classify": "guide.data",
    "guide": "guide.data",
    "image_text": "clip.data",
    "clip": "clip.data",
}


def listed(deps: list[str]) -> list[Path]:
    """Returns the Python files among `deps`; a folder stands for all files in it."""
    code = [ROOT / dep for dep in deps if dep.startswith(("pipelines/", "stages/"))]
    files = [file for path in code for file in (path.rglob("*.py") if path.is_dir() else [path])]
    return sorted(file for file in files if identity._has_statements(file))


def differences(stage: str, deps: list[str]) -> list[str]:
    """Returns lines that name the files missing in `deps`, and those that the stage does not run."""
    run, named = code_files(f"stages.{stage}"), listed(deps)
    lacking = [
        f"{stage}: {path.relative_to(ROOT)} is run and not among the deps"
        for path in run
        if path not in named
    ]
    return lacking + [
        f"{stage}: {path.relative_to(ROOT)} is among the deps and not run"
        for path in named
        if path not in run
    ]


@pytest.mark.parametrize("stage", COMPUTED)
def test_each_stage_depends_on_the_code_that_it_runs(stage):
    assert differences(stage, STAGES[stage]["deps"]) == []


def test_a_file_that_is_missing_or_not_needed_is_found():
    deps = STAGES["pretrain"]["deps"]
    params = [
        f"pipelines/params/{path.name}"
        for path in (ROOT / "pipelines/params").glob("*.py")
        if path.stem != "methods"
    ]
    without = [dep for dep in deps if dep != "pipelines/params"] + params
    assert differences("pretrain", without) == [
        "pretrain: pipelines/params/methods.py is run and not among the deps"
    ]
    too_much = [*deps, "pipelines/data/sources/voc2007.py"]
    assert differences("pretrain", too_much) == [
        "pretrain: pipelines/data/sources/voc2007.py is among the deps and not run"
    ]


def test_no_stage_depends_on_a_folder_of_other_stages_outputs():
    outs = {
        out if isinstance(out, str) else next(iter(out))
        for stage in STAGES.values()
        for out in stage.get("outs", ())
    }
    parents = {Path(out).parent.as_posix() for out in outs if "${" in out}
    assert not [(name, dep) for name, stage in STAGES.items() for dep in stage["deps"] if dep in parents]


@pytest.mark.parametrize("stage", TRAINED)
def test_dvc_and_run_directories_depend_on_the_same_params(stage):
    named = STAGES[stage]["params"]
    assert {key for key in named if key.startswith("training.")} == {
        f"training.{key}" for key in identity.COMPUTATION
    }
    data = DATA.get(stage, "data")
    knobs = {f"{data}.{key}" for key in set(DataParams.model_fields) - identity.SPEED}
    assert {key for key in named if key.startswith(f"{data}.")} == knobs


def test_knobs_of_speed_are_no_part_of_an_outcome():
    data = load(ROOT / "params.yaml").data
    faster = data.model_copy(update={"loader_workers": 4, "verify": True})
    assert identity.of_data(faster) == identity.of_data(data)
    assert identity.of_data(data.model_copy(update={"augment": "none"})) != identity.of_data(data)


def test_the_code_of_a_training_is_part_of_what_its_stage_depends_on():
    of_training = set(code_files(*identity.TRAINING))
    for stage in TRAINED:
        assert of_training <= set(listed(STAGES[stage]["deps"]))
    assert not [
        path for path in of_training if "sources" in path.parts or path.stem in ("coco_json", "voc_xml")
    ]


OWN_CODE = {"scenes": "drawing/scene", "coco2014": "formats/coco_json", "cifar10": "sources/cifar10"}


@pytest.mark.parametrize("source", OWN_CODE)
def test_a_data_set_depends_on_its_own_source_alone(source):
    of_source = [
        path.relative_to(ROOT / "pipelines") for path in code_files(f"pipelines.data.sources.{source}")
    ]
    files = {path.with_suffix("").as_posix().removeprefix("data/") for path in of_source}
    assert OWN_CODE[source] in files
    others = {"scenes", "cifar10", "coco2014", "imagefolder", "imagenet", "voc2007", "waterbirds"} - {source}
    assert not files & {f"sources/{other}" for other in others}
    assert ("formats/coco_json" in files) == (source == "coco2014")


def test_a_change_of_the_code_changes_its_digest(tmp_path, monkeypatch):
    shutil.copytree(
        ROOT / "pipelines", tmp_path / "pipelines", ignore=shutil.ignore_patterns("__pycache__", "recipes")
    )
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    for cached in (identity._imports, identity._file, identity._has_statements):
        cached.cache_clear()
    before = code_digest(*identity.TRAINING)
    with (tmp_path / "pipelines/data/formats/coco_json.py").open("a") as file:
        file.write("# changed\n")
    assert code_digest(*identity.TRAINING) == before
    with (tmp_path / "pipelines/params/methods.py").open("a") as file:
        file.write("# changed\n")
    assert code_digest(*identity.TRAINING) != before
    for cached in (identity._imports, identity._file, identity._has_statements):
        cached.cache_clear()
