"""Evidence on models: the records of an evaluation, confidence intervals, gates. Needs no PyTorch."""

from pipelines.evidence.intervals import Interval, difference, interval, intervals, parts
from pipelines.evidence.records import OF_EXPLANATIONS, OF_GRIDS, Records
