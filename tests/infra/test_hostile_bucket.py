"""Nobody with write access to the bucket can make `--take` touch more than the stage's outputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from dvc.repo import Repo

from infra import project, submit
from pipelines.storage.errors import StorageError
from pipelines.storage.publish import describe
from pipelines.workflow.submitted_job import Input, Order, OrderedStage, deliver, pull_inputs

GRAPH = """
stages:
  pretrain:
    cmd: "false"
    params: [training.workers]
    outs: [models/pretrain]
    metrics: [reports/pretrain/metrics.json]
  guide:
    cmd: "false"
    params: [training.workers]
    outs: [models/guide]
"""
OUTPUTS = ("models/pretrain", "reports/pretrain/metrics.json")
JOB = "jobs/pretrain-0123abcd"


@dataclass
class World:
    """A home folder with a project, and a bucket with the outputs of a job of the stage `pretrain`."""

    home: Path
    place: str

    def result(self) -> Any:
        """The content of `result.json`."""
        return json.loads(self.read("result.json"))

    def read(self, name: str) -> bytes:
        """A file of the job."""
        filesystem, root = fsspec.url_to_fs(self.place)
        return filesystem.cat_file(f"{root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the job under a key that need not be a normal path."""
        filesystem, root = fsspec.url_to_fs(self.place)
        filesystem.pipe_file(f"{root}/{name}", content)

    def change(self, change: Callable[[Any], Any]) -> None:
        """Changes the content of `result.json`."""
        content = self.result()
        self.write("result.json", json.dumps(change(content) or content).encode())

    def add(self, name: str, content: bytes = b"evil") -> None:
        """Delivers one more file, with the correct size and digest."""
        self.change(lambda result: result["files"].append(record(name, content)))
        with suppress(OSError):  # of a folder, or of a name that the bucket itself does not take
            self.write(f"outputs/{self.result()['attempt']}/{name}", content)

    def delivered(self, name: str) -> Path:
        """A delivered file, in a bucket that is a folder."""
        return Path(self.place.removeprefix("local://"), "outputs", self.result()["attempt"], name)

    def snapshot(self) -> dict[str, Any]:
        """Returns kind and content of everything in the home folder except DVC's own working files."""
        found = {}
        for path in sorted(self.home.rglob("*")):
            name = path.relative_to(self.home).as_posix()
            if not name.startswith("project/.dvc/tmp"):
                mode = path.lstat().st_mode
                content = (
                    os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
                )
                found[name] = (stat.S_IFMT(mode), content)
        return found


def record(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the home folder and the bucket of a `World`."""
    folder = tmp_path_factory.mktemp("template")
    home, job = folder / "home", folder / "job"
    here = home / "project"
    for name in (".ssh/id_rsa", "notes.txt"):
        write(home / name, f"the own {name}")
    for name in ("pipelines/code.py", "models/pretrain/old", "models/guide/own"):
        write(here / name, f"the own {name}")
    write(here / ".git/hooks/pre-commit", "own")
    write(here / "reports/pretrain/metrics.json", "{}")
    write(here / "dvc.yaml", GRAPH)
    write(here / "params.yaml", "training: {workers: 1}\n")
    Repo.init(str(here), no_scm=True).close()
    write(job / "models/pretrain/model.json", "{}")
    write(job / "models/pretrain/deep/model.safetensors", "weights")
    write(job / "reports/pretrain/metrics.json", '{"epoch": 1}')
    write(job / "runs/pretrain/0123456789ab/tracking/metrics.jsonl", "")
    with chdir(here):
        stages = project.stages("pretrain")
    ordered = tuple(OrderedStage(stage.name, stage.command, stage.outputs, stage.state) for stage in stages)
    with chdir(job):
        deliver(
            Order(f"local://{folder}/bucket/{JOB}", ordered, (), {}),
            [*OUTPUTS, "runs/pretrain/0123456789ab/tracking"],
        )
    return folder


@pytest.fixture(params=["local", "memory"])
def world(
    request: pytest.FixtureRequest, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "home/project")
    if request.param == "local":
        return World(tmp_path / "home", f"local://{tmp_path}/bucket/{JOB}")
    bucket = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(f"{tmp_path}/bucket", bucket, recursive=True)
    return World(tmp_path / "home", f"{bucket}/{JOB}")


def refused(world: World, capsys: pytest.CaptureFixture[str], place: str | None = None) -> str:
    """Asserts that `--take` fails and leaves the home folder unchanged; returns its one line."""
    before = world.snapshot()
    capsys.readouterr()
    assert submit.main(["--take", place or world.place]) == 1
    assert world.snapshot() == before
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == ""
    assert line.isprintable()
    return line


def test_what_an_honest_job_delivered_is_taken_and_nothing_else_changes(world: World) -> None:
    before = world.snapshot()
    assert submit.main(["--take", world.place]) == 0
    after = world.snapshot()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    own = (*(f"project/{output}" for output in OUTPUTS), "project/dvc.lock", "project/.dvc/cache")
    assert not [name for name in changed if not name.startswith(own)]
    assert Path("models/pretrain/deep/model.safetensors").read_text() == "weights"
    assert not Path("models/pretrain/old").exists()
    with Repo() as repo:
        assert repo.status(["pretrain"]) == {}
    assert submit.main(["--take", f"{world.place}/"]) == 0  # again, which changes nothing
    assert world.snapshot() == after


@pytest.mark.parametrize(
    "name",
    [
        "../../.ssh/authorized_keys",
        "models/pretrain/../../pipelines/code.py",
        "models/pretrain/deep/../../guide/own",
        "/etc/passwd",
        "//models/pretrain/x",
        "models/pretrain//x",
        "models/pretrain/./x",
        "models/pretrain/x/",
        "",
        ".",
        "..",
        "~/.ssh/authorized_keys",
        "C:/x",
        "models\\pretrain\\x",
        "models/pretrain/a\\..\\..\\b",
        "models/pretrain/a\nb",
        "models/pretrain/a\x00b",
        "models/pretrain/\x1b[2J",
        "models/pretrain/\u202egnp.exe",
        "models/pretrain/" + "x" * 256,
        "models/pretrain/" + "ä" * 128,
        "models/pretrain/" + "x/" * 600 + "x",
        "models/pretrain/.git/config",
        "models/pretrain/.dvcignore",
        "models/pretrain/.dvc/config",
        "models/pretrain2/x",
        "models/pretrainer",
        "models/guide/own",
        "Models/pretrain/x",
        "pipelines/code.py",
        "dvc.lock",
        "dvc.yaml",
        ".dvc/config.local",
        ".git/hooks/pre-commit",
        "reports/pretrain/other.json",
        "runs/pretrain/state.pt",
        "runs/tracking/run.json",
        "runs/../tracking/x",
        "runs/pretrain/../../pipelines/tracking/x",
        "models/pretrain/model.json",  # a second time
        "models/pretrain/model.json/x",  # a file, and a folder
        "models/pretrain/deep",
    ],
)
@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_a_name_outside_the_outputs_is_refused(
    name: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.add(name)
    line = refused(world, capsys)
    assert "the name" in line or "is in no output of the stage" in line


def of_first(**values: Any) -> Callable[[Any], None]:
    """Changes the description of the first file."""
    return lambda result: result["files"][0].update(values)


@pytest.mark.parametrize(
    "change",
    [
        of_first(bytes=1),
        of_first(bytes=10**18),
        of_first(bytes=10**40),
        of_first(bytes=-1),
        of_first(bytes=8.0),
        of_first(bytes="7"),
        of_first(bytes=True),
        of_first(bytes=None),
        of_first(sha256="0" * 64),
        of_first(sha256=""),
        of_first(sha256="../../../.ssh/id_rsa"),
        of_first(sha256=None),
        of_first(name=None),
        of_first(name=["models/pretrain/x"]),
        lambda result: result.update(attempt="../../x"),
        lambda result: result.update(attempt="/etc"),
        lambda result: result.update(attempt="01234567"),  # there is no such attempt
        lambda result: result.update(attempt=["01234567"]),
        lambda result: result.update(outputs="file:///etc", attempt=""),
        lambda result: result.update(stages={}),
        lambda result: result.update(stages={"pretrain": "0" * 64}),
        lambda result: result.update(stages={**result["stages"], "guide": "0" * 64}),
        lambda result: result.update(stages={"guide": result["stages"]["pretrain"]}),
        lambda result: result.update(files=[]),
        lambda result: result.update(files={}),
        lambda result: result.pop("files"),
        lambda result: result.update(
            files=[file for file in result["files"] if not file["name"].startswith("reports")]
        ),
        lambda result: [result],
        lambda result: "models/pretrain",
    ],
)
@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_a_result_that_is_none_is_refused(
    change: Any, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.change(change)
    refused(world, capsys)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"stages": {"\\ud800": ""}}', b"NaN"]
)
def test_a_result_that_is_no_json_is_refused(
    content: bytes, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.write("result.json", content)
    refused(world, capsys)


def test_a_result_of_any_length_is_not_read(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("pipelines.workflow.submitted_job.LONGEST_RESULT", 100)
    assert "at most 100 are read" in refused(world, capsys)


@pytest.mark.parametrize("content", [b"x" * 7, b"x" * 8, b"", b"x" * 10**6])
def test_a_file_of_other_bytes_is_refused(
    content: bytes, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "models/pretrain/deep/model.safetensors"
    world.write(f"outputs/{world.result()['attempt']}/{name}", content)
    assert name in refused(world, capsys)


def test_a_disk_that_is_too_small_is_seen_before(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert "there is room for 10 here" in refused(world, capsys)


def link_to_a_secret(world: World, path: Path) -> None:
    secret = world.home / ".ssh/id_rsa"
    path.symlink_to(secret)
    said = record(path.relative_to(world.delivered("")).as_posix(), secret.read_bytes())
    world.change(
        lambda result: [file.update(said) for file in result["files"] if file["name"] == said["name"]].clear()
    )


def folder_of_secrets(world: World, path: Path) -> None:
    path.parent.rename(world.home.parent / "moved")
    path.parent.symlink_to(world.home.parent / "moved")
    (path.parent / path.name).write_text("weights")


SPECIAL: dict[str, Callable[[World, Path], object]] = {
    "link": link_to_a_secret,
    "link to nothing": lambda world, path: path.symlink_to(world.home / "nothing"),
    "link to itself": lambda world, path: path.symlink_to(path),
    "endless": lambda world, path: path.symlink_to("/dev/zero"),
    "pipe": lambda world, path: os.mkfifo(path),
    "folder": lambda world, path: path.mkdir(),
    "missing": lambda world, path: None,
    "behind a link": folder_of_secrets,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("world", ["local"], indirect=True)
def test_what_is_no_plain_file_is_refused(
    kind: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world.delivered("models/pretrain/deep/model.safetensors")
    path.unlink()
    SPECIAL[kind](world, path)
    assert "deep/model.safetensors" in refused(world, capsys)


@pytest.mark.parametrize("name", ["result.json", "outputs"])
@pytest.mark.parametrize("world", ["local"], indirect=True)
def test_a_job_that_is_elsewhere_is_refused(
    name: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(world.place.removeprefix("local://"), name)
    path.rename(world.home.parent / "elsewhere")
    path.symlink_to(world.home.parent / "elsewhere")
    assert "is a link" in refused(world, capsys)


@pytest.mark.parametrize(
    "name", ["models", "models/pretrain", "reports/pretrain", "reports/pretrain/metrics.json"]
)
@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_an_output_that_is_a_link_here_is_refused(
    name: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).rename(world.home / "elsewhere")
    Path(name).symlink_to(world.home / "elsewhere")
    assert f"{name} is a link" in refused(world, capsys)


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_links_in_an_output_are_replaced_and_not_followed(world: World) -> None:
    Path("models/pretrain/deep").symlink_to(world.home / ".ssh")
    Path("models/pretrain/model.json").symlink_to(world.home / "notes.txt")
    before = world.snapshot()
    assert submit.main(["--take", world.place]) == 0
    after = world.snapshot()
    assert all(
        after[name] == before[name] for name in (".ssh/id_rsa", "notes.txt", "project/models/guide/own")
    )
    assert not Path("models/pretrain/deep").is_symlink()


@pytest.mark.parametrize(
    "job", ["jobs/guide-0123abcd", "jobs/evaluate-0123abcd", "jobs/pretrain", "jobs/pretrain-../x", "x", ""]
)
@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_a_job_is_of_the_stage_in_its_name(
    job: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{world.place.removesuffix(JOB)}{job}"
    fsspec.filesystem("memory").pipe_file(f"{place}/result.json", world.read("result.json"))
    refused(world, capsys, place)


def test_what_was_there_comes_back_if_dvc_does_not_record_the_outputs(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        assert Path("models/pretrain/model.json").exists()
        raise project.SubmitError(f"{name}: no")

    monkeypatch.setattr(project, "commit", fail)
    assert "pretrain: no" in refused(world, capsys)
    Path("reports/pretrain/metrics.json").unlink()
    refused(world, capsys)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"logged": true, "tracking_uri": 5}', b"\xff"])
@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_a_tracked_run_that_is_none_is_one_line_and_the_outputs_are_here(
    content: bytes, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.add("runs/pretrain/0123456789ab/tracking/run.json", content)
    before = set(world.snapshot())
    assert submit.main(["--take", world.place]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "not logged to MLflow" in line
    assert not [name for name in set(world.snapshot()) - before if name.startswith("project/runs")]
    assert Path("models/pretrain/model.json").exists()


@pytest.mark.parametrize("content", [b"evil", b"weightz", b""])
def test_a_job_refuses_inputs_that_are_not_those_published(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    item = Input(
        "models/pretrain", f"memory://{tmp_path.name}/models", (describe(tmp_path, "model.safetensors"),)
    )
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/models/model.safetensors", content)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        pull_inputs([item], tmp_path / "job")
