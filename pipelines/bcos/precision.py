"""Keeps single precision where half precision or TF32 would lose too many digits.

Under autocast, norms, statistics, cosine factors and logits stay in float32 (`widened`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_float32() -> Iterator[None]:
    """Context manager or decorator: in it, GPUs compute float32 convolutions without TF32.

    TF32, torch's default for convolutions, has the digits of float16. Without it, W(x)·x sums to the logit up
    to the rounding of float32.
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def widened(x: Tensor) -> Tensor:
    """`x` in float32 if it is float16 or bfloat16, else `x` itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
