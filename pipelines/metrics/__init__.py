"""Every metric: classification, localisation, the grid pointing game, agreement, faithfulness."""

from pipelines.metrics.agreement import Agreement, agreement, explanation_similarity
from pipelines.metrics.classification import (
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
    IoU,
    LocalisationMetric,
    PointingGame,
    area_share,
    attribution_iou,
    box_masks,
    energy_pointing_game,
    object_masks,
    select_boxes,
    size_corrected,
    without_energy,
    without_union,
)
