"""One file a method: how it trains, and how it is evaluated."""

from pipelines.methods.base import Batch, Classification, Method
from pipelines.methods.bcosification import Bcosification
from pipelines.methods.pretrain import Pretrain

__all__ = ["Batch", "Bcosification", "Classification", "Method", "Pretrain"]
