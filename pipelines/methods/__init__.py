"""One file a method: how it trains, and how it is evaluated."""

from pipelines.methods.base import Batch, Classification, Method
from pipelines.methods.bcosification import Bcosification, build_bcosification
from pipelines.methods.e2kd import E2KD, build_e2kd, check_pair
from pipelines.methods.pretrain import Pretrain, build_pretrain

__all__ = [
    "E2KD",
    "Batch",
    "Bcosification",
    "Classification",
    "Method",
    "Pretrain",
    "build_bcosification",
    "build_e2kd",
    "build_pretrain",
    "check_pair",
]
