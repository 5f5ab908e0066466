"""Tracking with MLflow: runs (written to disk first), the model registry and the served model.

Only this package imports mlflow, and only when it is used.
"""

from pipelines.tracking.provenance import lock_hash
from pipelines.tracking.registry import (
    Registered,
    TrackingError,
    load,
    load_text_tower,
    model_folder,
    register,
)
from pipelines.tracking.runs import EpochLogger, StageRun, child_run, stage_run
from pipelines.tracking.server import tracking_uri, where_to_look
