"""All metrics: classification, localisation, grid pointing game, agreement, faithfulness, retrieval."""

from pipelines.directions import SIZES, higher_is_better, rising, with_arrows
from pipelines.metrics.agreement import Agreement, agreement, explanation_similarity
from pipelines.metrics.classification import (
    Accuracy,
    CalibrationError,
    UnexplainedShare,
    multiclass_metrics,
    multilabel_metrics,
)
from pipelines.metrics.faithfulness import deletion, insertion, removal_curve
from pipelines.metrics.grid import (
    Grid,
    confidence,
    draw_grids,
    eligible,
    grid_batches,
    grid_pointing_game,
    grid_scores,
    in_windows,
    tile,
)
from pipelines.metrics.localisation import (
    THRESHOLDS,
    IoU,
    PointingGame,
    area_share,
    attribution_iou,
    box_masks,
    energy_pointing_game,
    iou_by_threshold,
    object_masks,
    select_boxes,
    size_corrected,
    without_energy,
    without_union,
)
from pipelines.metrics.means import LocalisationMetric, MeanScore, measured
from pipelines.metrics.retrieval import Recall
