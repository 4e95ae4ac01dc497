"""Count the bytes that interpreted kernels load from and store to given tensors."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class Traffic:
    """Bytes loaded and stored, in all and within the memory of a tensor."""

    def __init__(self) -> None:
        self.loads: list[tuple[np.ndarray, int]] = []
        self.stores: list[tuple[np.ndarray, int]] = []
        self.launches: Counter[str] = Counter()

    def loaded(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes loaded from a tensor, or from anywhere."""
        return sum(_bytes_within(addresses, size, tensor) for addresses, size in self.loads)

    def stored(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes stored to a tensor, or to anywhere."""
        return sum(_bytes_within(addresses, size, tensor) for addresses, size in self.stores)


def _bytes_within(addresses: np.ndarray, size: int, tensor: torch.Tensor | None) -> int:
    if tensor is None:
        return addresses.size * size
    start = tensor.untyped_storage().data_ptr()
    stop = start + tensor.untyped_storage().nbytes()
    return int(((addresses >= start) & (addresses < stop)).sum()) * size


@contextmanager
def counted_traffic(monkeypatch) -> Iterator[Traffic]:
    """Record every load, store and launch of interpreted kernels made inside."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch = GridExecutor.__call__

    def counted_load(self, ptrs, mask, *rest):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        kept = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        traffic.loads.append((ptrs.data[kept], max(size, 1)))
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        kept = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        traffic.stores.append((ptrs.data[kept], max(size, 1)))
        return store(self, ptrs, value, mask, *rest)

    def counted_launch(self, *args, **kwargs):
        traffic.launches[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(GridExecutor, "__call__", counted_launch)
        yield traffic
