"""Models of torch.compile, whose compiled code does not see hooks that were put in after it was made."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def is_compiled(model: nn.Module) -> bool:
    """Whether it, or a part of it, was compiled."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules())


def uncompiled() -> AbstractContextManager:
    """Inside, whatever was compiled runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing was, and to import it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
