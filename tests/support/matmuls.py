"""Count the operations of matmuls, and see the largest tensor, forward and backward.

`torch.utils.flop_counter` misses matmuls that write into their argument, such as `addmm_`.
"""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FIRST_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}


class MatmulAudit(TorchDispatchMode):
    """While active, adds up 2·m·n·k of every matmul, and keeps the sides of their factors and the
    size of the largest result. `side` leaves the matmuls without a side of that length out of the
    sum.
    """

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        self.side = side
        self.paused = False
        self.operations = 0
        self.sides: set[int] = set()  # of all factors
        self.largest = 0  # elements of storage that a result owns

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        if name in _FIRST_FACTOR:
            a, b = args[_FIRST_FACTOR[name]], args[_FIRST_FACTOR[name] + 1]
            self.sides |= {*a.shape, *b.shape}
            if self.side is None or self.side in (*a.shape, *b.shape):
                self.operations += 2 * a.numel() * b.shape[-1]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, size)
        return result
