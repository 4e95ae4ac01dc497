"""Find out whether a call is run, or traced into a graph.

Checks that read what tensors hold, and code that must not be traced, ask it first; see `checks.py`
and `backend.py`.
"""

import torch
from torch._guards import TracingContext


def being_traced() -> bool:
    """Whether PyTorch's compiler or exporter traces this call, so that no tensor holds a value.

    `torch.compiler.is_compiling()` alone is also true in all other threads of a process while one
    of them compiles.
    """
    if not torch.compiler.is_compiling():
        return False
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return True
    return TracingContext.try_get() is not None  # of this thread
