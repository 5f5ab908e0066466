"""The library: everything that is computed."""

from pipelines import process  # sets up threads and memory before torch is imported
