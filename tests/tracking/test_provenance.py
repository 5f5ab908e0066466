import subprocess

from pipelines.tracking import lock_hash
from pipelines.tracking.provenance import git_tags, input_hashes

LOCK = """
schema: '2.0'
stages:
  shard@objects:
    cmd: python -m stages.shard
    deps: [{path: data/raw/objects, hash: md5, md5: 111.dir, size: 1}]
    outs: [{path: data/shards/objects, hash: md5, md5: 222.dir, size: 1}]
"""


def test_inputs_are_hashed_as_the_lock_records_them(tmp_path):
    lock = tmp_path / "dvc.lock"
    lock.write_text(LOCK)
    inputs = {"shards": "data/shards/objects/manifest.json", "teacher": "models:/x/1"}
    assert input_hashes(inputs, lock) == {"shards": "222.dir", "teacher": "models:/x/1"}
    before = lock_hash(inputs, lock)
    assert before == lock_hash(dict(reversed(inputs.items())), lock)
    lock.write_text(LOCK.replace("222", "333"))
    assert lock_hash(inputs, lock) != before


def test_without_a_lock_the_inputs_themselves_are_hashed(tmp_path):
    assert input_hashes({"shards": "data/shards"}, tmp_path / "dvc.lock") == {"shards": "data/shards"}


def test_absolute_inputs_are_found_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.lock").write_text(LOCK)
    assert input_hashes({"shards": str(tmp_path / "data/shards/objects")}) == {"shards": "222.dir"}


def test_the_commit_is_dirty_where_files_differ_but_for_the_lock(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert git_tags(tmp_path) == {}
    monkeypatch.setenv("SUBMITTED_COMMIT", "0" * 40)  # as in a submitted job
    monkeypatch.setenv("SUBMITTED_DIRTY", "false")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": "0" * 40, "git.dirty": "false"}
    git("init")
    for name in ("code.py", "dvc.lock"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert git_tags(tmp_path)["git.dirty"] == "false"
    (tmp_path / "dvc.lock").write_text("2")
    assert git_tags(tmp_path)["git.dirty"] == "false"
    (tmp_path / "code.py").write_text("2")
    assert git_tags(tmp_path)["git.dirty"] == "true"
    assert len(git_tags(tmp_path)["mlflow.source.git.commit"]) == 40
