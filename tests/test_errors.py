"""Errors and redacted texts have no secrets of addresses."""

import pytest

from pipelines.errors import UserError, redacted
from pipelines.storage.errors import StorageError, one_line

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"https://host/x.zip?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}", "https://host/x.zip?***"),
        (
            f"https://account.blob.core.windows.net/c/x.tar?sv=2024&sig={SECRET}%3D",
            "https://account.blob.core.windows.net/c/x.tar?***",
        ),
        (f"https://host/x#access_token={SECRET}", "https://host/x#***"),
        (f"https://user:{SECRET}@host:5000/x", "https://host:5000/x"),
        (f"https://{SECRET}@host/x", "https://host/x"),
        (
            f"postgresql+psycopg2://mlflow:{SECRET}/with@signs@db:5432/mlflow",
            "postgresql+psycopg2://db:5432/mlflow",
        ),
        (f"postgresql://mlflow:/{SECRET}@db/mlflow", "postgresql://db/mlflow"),
        (f"sftp://user:{SECRET}@host/folder", "sftp://host/folder"),
    ],
)
def test_an_address_has_no_secret_wherever_it_stands_in_a_text(address, expected):
    assert redacted(address) == expected
    assert redacted(f"{address}: no such file") == f"{expected}: no such file"
    assert redacted(f"two, {address} and ({address}).") == f"two, {expected} and ({expected})."
    for text in (repr({"root": address}), f'{{"root": "{address}"}}', f"zip://a.csv::{address}"):
        assert SECRET not in redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/images@v2/train",
        "https://host:5000/path@v1",
        "http://[::1]:5000/x@y",
        "models:/bcos@candidate",
        "sqlite:////project/what%3Fnow/mlflow.db?timeout=5",
        "file:///srv/what?now#1",
        "/srv/what?now",
        "is it there? see a@b.example",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_errors_of_all_kinds_are_redacted():
    address = f"https://user:{SECRET}@host/x.zip?sig={SECRET}"
    for error in (UserError(f"{address}: gone"), StorageError(f"{address}: gone", 2)):
        assert str(error) == "https://host/x.zip?***: gone"
    assert one_line(OSError(f"no answer from {address}")) == "no answer from https://host/x.zip?***"
