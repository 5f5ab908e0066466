"""Single precision: tensors that keep it under autocast (norms, statistics, cosine factors, logits), and without TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_float32() -> Iterator[None]:
    """In the block convolutions of float32 are float32 on GPUs too, where torch's default is TF32, with the digits of float16.

    W(x)·x then sums to the logit up to rounding. A decorator as well.
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def widened(x: Tensor) -> Tensor:
    """`x` in float32 if it is of half precision, else `x` itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
