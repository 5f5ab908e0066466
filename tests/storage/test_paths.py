"""Paths in params name the same files in the project's folder and in a copy for an experiment."""

import os
from pathlib import Path

import pytest

from pipelines.storage.paths import absolute, run_directory, users_path


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project as DVC makes it, with tracked files only; it is the working directory."""
    project = tmp_path / "project"
    for name in ("images.zip", "weights/a.pth", "images/cat/1.png", "models/teacher/model.json", "scratch/x"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("the user's")
    copy = project / ".dvc/tmp/exps/standalone/tmp1"
    for name in ("models/teacher/model.json", "images/.gitignore"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("the copy's")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(project))
    return copy


def test_what_git_does_not_know_is_found_in_the_projects_folder(copy: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    assert users_path("images.zip") == str(project / "images.zip")
    assert users_path("./weights/a.pth") == str(project / "weights/a.pth")
    assert users_path("../other.zip") == str(tmp_path / "other.zip")
    assert users_path("nothing.zip") == str(project / "nothing.zip")


def test_what_the_stages_made_is_the_copys_own(copy: Path) -> None:
    assert users_path("models/teacher") == str(copy / "models/teacher")
    assert users_path("models/teacher/model.json") == str(copy / "models/teacher/model.json")


def test_a_folder_that_git_keeps_empty_is_not_the_users(copy: Path, tmp_path: Path) -> None:
    assert users_path("images") == str(tmp_path / "project/images")


def test_absolute_paths_and_urls_stay(copy: Path, tmp_path: Path) -> None:
    assert users_path(tmp_path / "x.zip") == users_path(f"file://{tmp_path}/x.zip") == str(tmp_path / "x.zip")
    assert users_path("s3://bucket/images/") == "s3://bucket/images"
    assert users_path("https://host/x.zip?download=1") == "https://host/x.zip?download=1"
    assert users_path("~/x.zip") == os.path.expanduser("~/x.zip")


def test_two_experiments_at_once_have_runs_of_their_own_unless_the_storage_is_elsewhere(
    copy: Path, tmp_path: Path
) -> None:
    assert run_directory("runs", "pretrain").startswith(f"{copy}/runs/pretrain/")
    assert absolute("../scratch") == str(tmp_path / "scratch")


def test_without_dvc_all_are_seen_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert users_path("images.zip") == absolute("images.zip") == str(tmp_path / "images.zip")
    assert users_path("../x") == absolute("../x") == str(tmp_path.parent / "x")
