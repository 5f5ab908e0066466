"""The library of the project: models, explanations, data, training and evaluation."""

from pipelines import process  # sets up threads and memory, which must happen before torch is imported
