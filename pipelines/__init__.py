"""The library: everything that is computed."""

from pipelines import process as _process  # noqa: F401  (sets up threads and memory before torch is imported)
