"""The training loop, its checkpoints, and its launch in this process or on Ray Train workers."""

from pipelines.distributed import Context
from pipelines.training.job import (
    EpochRecord,
    Job,
    Result,
    TrainingError,
    best_record,
    shard_batches,
)
from pipelines.training.launch import cluster, launch, train
from pipelines.training.validation import evaluate_split
