"""All metrics: classification, localisation, grid pointing, agreement, faithfulness, removal, retrieval."""

from pipelines.directions import SIZES, higher_is_better, rising, with_arrows
from pipelines.metrics.agreement import Agreement, agreement, explanation_similarity
from pipelines.metrics.classification import (
    Accuracy,
    CalibrationError,
    multiclass_metrics,
    multilabel_metrics,
)
from pipelines.metrics.faithfulness import (
    area_under,
    deletion,
    insertion,
    removal_curve,
    single_deletion,
)
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
from pipelines.metrics.rank_correlation import rank_correlation
from pipelines.metrics.removal import (
    IMPORTANCE_THRESHOLDS,
    data_check,
    distractibility,
    important,
    names_most_important,
    removal_correlation,
    target_sensitivity,
)
from pipelines.metrics.retrieval import Recall
