"""README and docs/: links, names and commands are real, and the examples of docs/adding.md run."""

import ast
import importlib
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

import infra.submit
from benchmarks.experiments import SECTIONS
from pipelines import params
from pipelines.methods.method import Classification
from pipelines.storage import files
from pipelines.tracking import review
from stages.tools import explain_text

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
GENERATED = {"architectures.md", "params.md"}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PLACEHOLDER = re.compile(r"NAME|STAGE|<\w+>|confident|leaves")  # names of what a reader adds
SUFFIXES = (".py", ".yaml", ".md", ".toml", ".lock")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def text_of(page: Path) -> str:
    return page.read_text()


@cache
def prose_of(page: Path) -> str:
    """The page without its code blocks."""
    lines = FENCE.sub("", text_of(page)).splitlines()
    return "\n".join(line for line in lines if not line.startswith("    "))


@cache
def commands_of(page: Path) -> list[list[str]]:
    """The shell commands of a page's indented blocks, split into words, except those that have a `...`."""
    indented = [line[4:] for line in FENCE.sub("", text_of(page)).splitlines() if line.startswith("    ")]
    lines = "\n".join(indented).replace("\\\n", " ").splitlines()
    known = re.compile(r"(export \S+ )*(dvc|python|make|mlflow|\.venv/bin/\S+|pip) ")
    lines = [line for line in lines if known.match(line) and "..." not in line]
    return [shlex.split(line, comments=True) for line in lines]


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return tuple(f"/{path}" for path in listed.stdout.split("\n"))


@cache
def checked(overrides: tuple[str, ...]) -> params.Params:
    """The params that `dvc exp run -S OVERRIDE ...` composes; raises if Hydra or the schema refuses them."""
    with initialize_config_dir(str(ROOT / "pipelines/recipes"), version_base=None):
        config = compose("config", overrides=list(overrides))
    OmegaConf.resolve(config)
    return params.validate(OmegaConf.to_container(config))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name
)
def test_lines_of_prose_are_short(page):
    lines = [line for line in prose_of(page).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 130] == []


def test_the_readme_is_one_page():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in slugs(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    for name in re.findall(r"`([\w./<>-]+)`", prose_of(page)):
        if name.endswith(SUFFIXES) and not PLACEHOLDER.search(name):
            assert any(path.endswith(f"/{name}") for path in tracked()), name
        if name.endswith("/") and name.split("/")[0] in (
            "pipelines",
            "stages",
            "infra",
            "tests",
            "benchmarks",
        ):
            assert (ROOT / name).is_dir(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_targets_that_are_named_are_there(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for module in re.findall(r"python -m ([a-z_]+(?:\.[a-z_0-9]+)+)", text_of(page)):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for words in re.findall(r"(?:`|^    )make ((?:[a-z-]+ ?)+)", text_of(page), re.MULTILINE):
        assert set(words.split()) <= set(targets), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dvc_commands_name_stages_and_params_that_there_are(page):
    for words in commands_of(page):
        if words[:2] in (["dvc", "repro"], ["dvc", "exp"]) and words[2] != "show":
            words = words[: words.index("&&")] if "&&" in words else words
            given = words[3 if words[1] == "exp" else 2 :]
            pairs = [(before, word) for before, word in zip(["", *given], given, strict=False)]
            checked(tuple(word for before, word in pairs if before == "-S"))
            stages = [word for before, word in pairs if word[0] != "-" and before not in ("-S", "-j")]
            assert {stage.partition("@")[0] for stage in stages} <= STAGES.keys(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_commands_have_arguments_that_there_are(page):
    for words in commands_of(page):
        match words[:3]:
            case ["python", "-m", "infra.submit"]:
                options = infra.submit.parse(words[3:])
                checked(tuple(options.overrides))
                assert options.stage in (None, "STAGE") or options.stage.partition("@")[0] in STAGES, words
            case ["python", "-m", "stages.tools.explain_text"]:
                explain_text.parser().parse_args(words[3:])
            case ["python", "-m", "pipelines.tracking.review"]:
                review.parser().parse_args(words[3:])
            case ["python", "-m", "benchmarks.experiments"]:
                keys = {word.partition("=")[0] for word in words[4:] if "=" in word}
                top = params.Params.model_fields
                full = {
                    key if key.partition(".")[0] in top else f"{SECTIONS[words[3]]}.{key}" for key in keys
                }
                assert full <= params.leaves(checked(()).model_dump(mode="json")).keys(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_python_examples_import_are_there(page):
    for _, code in (block for block in FENCE.findall(text_of(page)) if block[0] == "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_examples_of_what_can_be_added_run(tmp_path, monkeypatch):
    found: dict = {}
    for kind, code in FENCE.findall(text_of(ROOT / "docs/adding.md")):
        if kind == "python":
            exec(compile(code, "docs/adding.md", "exec"), found)
    method_of_example(found)
    source_of_example(found, tmp_path)
    metric = found["PeakInside"]()
    maps = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]])
    metric.update(maps, torch.tensor([[[False, True], [False, False]]] * 2))
    assert metric.compute() == 0.5


def method_of_example(found):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6 * 4 * 4, 3))
    method: Classification = found["Confident"](
        network, "multiclass", 3, SimpleNamespace(mixup=0, entropy_weight=1.0)
    )
    prepared = method.prepare({"image": torch.rand(2, 3, 4, 4), "label": torch.tensor([0, 2])})
    losses = method.loss(network, prepared)
    assert set(losses) == set(method.losses)
    assert losses["loss"] > losses["entropy"] > 0


def source_of_example(found, folder):
    for split in ("training", "testing"):
        for number in range(4):
            path = folder / "leaves" / split / "oak" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    given = found["LeavesParams"](source="leaves", root=str(folder / "leaves"), val_count=1)
    source, raw = found["SOURCE"](given), folder / "raw"
    source.fetch(raw, folder / "cache", progress=False)
    assert source.describe(raw).counts == {"train": 3, "val": 1, "test": 4}
    assert source.load(raw, source.index(raw, "test")[0]).label == 0
    assert files.read_json(raw / "manifest.json") is not None
