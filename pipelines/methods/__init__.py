"""Training methods, one per file, each with its losses and evaluation metrics."""

from pipelines.methods.bcosification import Bcosification, build_bcosification
from pipelines.methods.clip import (
    ClipBcosification,
    ImageText,
    ImageTextTraining,
    build_clip,
    build_image_text,
    check_equal_shares,
)
from pipelines.methods.e2kd import E2KD, build_e2kd, check_pair
from pipelines.methods.guidance import (
    Guidance,
    ObjectClassification,
    build_classifier,
    build_guidance,
    check_guidable,
    classifier_spec,
)
from pipelines.methods.method import Classification, Method
from pipelines.methods.pretrain import Pretrain, build_pretrain
