"""What stays in single precision under autocast: norms, their statistics, the cosine factor, and logits."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32 where it is of half precision, `x` itself where not."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
