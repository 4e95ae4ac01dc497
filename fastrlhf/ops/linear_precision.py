"""In which dtype the matmuls of a head run, under autocast or without it.

Operations from hidden states follow `F.linear`: the dtype is that of the hidden states and weights,
or that of autocast. Only the operands of the matmuls are rounded to it. Sums are fp32 or fp64 (see
`linear_head.py`), and `exact` keeps autocast from rounding them.
"""

import torch
from torch import Tensor


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of a matmul of hidden states: their own, or that of autocast."""
    autocast = autocast_decides(hidden)
    return torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype


def autocast_decides(hidden: Tensor) -> bool:
    """Whether autocast decides the dtype of a matmul of hidden states: it leaves fp64 alone."""
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64


def exact(hidden: Tensor) -> torch.autocast:
    """Turn autocast off, so that it rounds no fp32 sums. The operands have its dtype already."""
    return torch.autocast(hidden.device.type, enabled=False)
