"""What stays in single precision under autocast: norms, their statistics, the cosine factor, and logits."""

import torch
from torch import Tensor


def forbid_tf32() -> None:
    """Makes float32 mean float32 on GPUs: torch's convolutions there are of TF32 by default, which has the digits of float16.

    W(x)·x then sums to the logit no better than to a thousandth; where that is enough, bfloat16 takes half the time.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def widened(x: Tensor) -> Tensor:
    """`x` in float32 where it is of half precision, `x` itself where not."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
