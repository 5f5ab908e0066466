"""Single precision: tensors that keep it under autocast (norms, statistics, cosine factors, logits), and without TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_float32() -> Iterator[None]:
    """In the block, GPUs compute float32 convolutions in float32, not in torch's default, TF32, which has the digits of float16.

    W(x)·x then sums to the logit up to rounding. Also a decorator.
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def widened(x: Tensor) -> Tensor:
    """`x` in float32 if it is of half precision, else `x` itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
