import pytest

from pipelines.data.shards.sample import DataError
from pipelines.workflow import running


def test_an_error_that_the_user_can_mend_ends_a_stage_with_its_line_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"params\.yaml"), running.stage():
        pass
    monkeypatch.setattr(running, "load", lambda: None)
    with pytest.raises(SystemExit, match="a broken shard"), running.stage():
        raise DataError("a broken shard")
    with pytest.raises(ZeroDivisionError), running.stage():
        raise ZeroDivisionError
