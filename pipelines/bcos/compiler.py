"""How torch.compile is to treat B-cos networks."""

import torch
import torch._functorch.config


def set_up_compiler() -> None:
    """Sets what holds for all compiled networks of this process.

    DDP's own splitting of compiled graphs cannot take B-cos layers. Backward passes compute factors and masks again from what
    convolutions gave: that costs less than to write them to memory and read them.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._functorch.config.aggressive_recomputation = True
