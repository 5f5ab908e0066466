"""Transient errors of a remote storage are retried; all other errors are raised at once."""

from __future__ import annotations

import itertools
import urllib.error
from pathlib import Path

import botocore.exceptions
import pytest

from pipelines.storage.errors import StorageError
from pipelines.storage.retry import of_a_client, retried, retry

URL = "s3://bucket/x"
UNREACHABLE = botocore.exceptions.EndpointConnectionError(endpoint_url="http://storage")


class Clock:
    """A clock that advances only through `sleep`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    "error", [OSError(5, "input/output error"), TimeoutError(), UNREACHABLE, urllib.error.URLError("reset")]
)
def test_what_may_pass_is_tried_again_ever_later_and_in_the_end_told_in_one_line(error: Exception) -> None:
    clock, tries = Clock(), []

    def call() -> str:
        tries.append(clock.now)
        if clock.now < 20:
            raise error
        return "there"

    assert retry(call, URL, 60, clock, clock.sleep) == "there"
    assert 6 < len(tries) < 15
    clock.now = -1000.0
    with pytest.raises(OSError, match=r"^[^\n]*$"):
        retry(call, URL, 60, clock, clock.sleep)
    assert -940 <= clock.now < -920


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("x"),
        ValueError("x"),
        OSError(28, "full"),
        botocore.exceptions.NoCredentialsError(),
    ],
)
def test_what_does_not_pass_is_raised_at_once(error: Exception) -> None:
    def call() -> None:
        tries.append(1)
        raise error

    tries: list[int] = []
    with pytest.raises(type(error) if not of_a_client(error) else StorageError):
        retry(call, URL)
    assert len(tries) == 1


def test_nothing_on_this_machine_is_tried_again(tmp_path: Path) -> None:
    tries = itertools.count()
    with pytest.raises(OSError, match="full of dust"):
        retry(lambda: next(tries) >= 0 and (_ for _ in ()).throw(OSError("full of dust")), str(tmp_path))
    assert next(tries) == 1


def test_a_call_within_a_retried_call_leaves_its_errors_to_the_outer_one() -> None:
    clock, inner, outer = Clock(), [], []

    @retried
    def fails_twice(place: str) -> str:
        inner.append(place)
        if len(inner) < 3:
            raise UNREACHABLE
        return "there"

    def call() -> str:
        outer.append(1)
        return fails_twice(URL)

    assert retry(call, URL, 60, clock, clock.sleep) == "there"
    assert len(inner) == len(outer) == 3
