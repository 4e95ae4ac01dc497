"""Whether a function would make the host wait for a GPU, found out on a CPU."""

from torch.utils._python_dispatch import TorchDispatchMode

_LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class NoWaiting(TorchDispatchMode):
    """Refuse to look at a value, and sizes that depend on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in _LOOKS, f"the host waits: {name}"
        return func(*args, **(kwargs or {}))
