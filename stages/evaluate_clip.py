"""Stage `evaluate_clip`: original and B-cosified towers beside each other; figures and pictures in `reports/evaluate_clip`."""

from pipelines.evaluation.text_gallery import draw_text_gallery
from pipelines.storage.files import write_json
from pipelines.workflow.evaluating import CLIP_CODE, evaluate_towers, towers
from pipelines.workflow.identity import of_data
from pipelines.workflow.places import REPORTS
from pipelines.workflow.reports import flat
from pipelines.workflow.running import stage
from pipelines.workflow.training import tracked

OUT = REPORTS / "evaluate_clip"
