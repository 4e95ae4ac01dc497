"""Count the operations of every matmul, from the shapes of its arguments; find the largest output.

A mode of our own, because `torch.utils.flop_counter` misses `addmm_` and `addmm` with `out=`.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_FACTORS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.addmm_: 1}  # position of the first
_UNCOUNTED = {_aten.baddbmm, _aten.baddbmm_, _aten.mv, _aten.addmv, _aten.addmv_, _aten.linear}


class FlopAudit(TorchDispatchMode):
    """While active: `flops` is Σ 2·m·n·k over matmuls, `largest` the elements of the largest tensor
    that an operation gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        assert packet not in _UNCOUNTED, f"{packet} is not counted"
        if packet in _FACTORS:
            a, b = args[_FACTORS[packet] : _FACTORS[packet] + 2]
            self.flops += 2 * a.numel() * b.shape[-1]  # a is (..., m, k), b (..., k, n)
        outputs = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return outputs
