import sys

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


def test_nothing_that_a_stage_prints_has_a_secret(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(running, "load", lambda: None)
    address = "https://user:s3cr3t@host/x.zip?sig=s3cr3t"

    def read():
        with running.stage():
            print("reading", address)
            print(f"trying {address} again", file=sys.stderr)
            raise FileNotFoundError(f"{address}: gone")

    with pytest.raises(SystemExit) as ended:
        read()
    assert ended.value.code == "https://host/x.zip?***: gone"
    sys.excepthook(ValueError, ValueError(address), None)
    out, err = capsys.readouterr()
    assert out == "reading https://host/x.zip?***\n"
    assert err == "trying https://host/x.zip?*** again\nValueError: https://host/x.zip?***\n"
