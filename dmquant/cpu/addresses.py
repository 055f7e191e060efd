"""When compiled code may work on the memory of a tensor, unseen by torch."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is no more than its memory, and nothing watches what is done with it.

    What is computed by address is missing in a trace (`torch.jit.trace`, `make_fx`), in forward derivatives, and for
    `vmap` and modes that see every operation: these take the operations of torch.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )
