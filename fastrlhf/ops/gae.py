"""Generalised advantage estimation, by a scan on a GPU.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

import contextlib

import torch
from torch import Tensor

from fastrlhf import reference

from . import compiled_rows
from .backend import backend_of, under_transform, use_triton
from .checks import (
    check_between,
    check_floating,
    check_mask,
    check_real,
    check_same_device,
    check_shape,
    token_contiguous,
)
from .compiled import NotCompiled
from .layout import layout_of
from .tracing import being_traced


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Estimate the advantage of each token, and the return that its value should have predicted.

    Eager equivalent, for one sequence, where everything counts and the value after the end is 0::

        for t in reversed(range(T)):
            delta = rewards[t] + gamma * values[t + 1] - values[t]
            advantages[t] = delta + gamma * lam * advantages[t + 1]
        returns = advantages + values

    Args:
        rewards: (B, T), or with cu_seqlens (N,) or (1, N) as all below; see `shaped_rewards`.
        values: (B, T) that the value model gave when the tokens were sampled.
        mask: (B, T) bool or 0/1, the tokens that count. The others can hold anything, and may stand
            anywhere: the token after them is the next one of the token before them.
        gamma: discount in [0, 1].
        lam: λ in [0, 1], between one-step (0) and Monte Carlo estimates (1).
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last: nothing
            is handed over them.
        impl: "auto" (Triton on a GPU, and under TRITON_INTERPRET=1; else eager PyTorch), "triton",
            "compiled" (eager PyTorch for packed sequences) or "eager".

    Returns:
        advantages and returns, each of the shape of rewards, fp32 (fp64 if an input is), 0 outside
        of the mask; not differentiable. Under torch.func.vmap and other transforms it is plain
        PyTorch.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; gamma or lam outside
            [0, 1].

    Source: 1506.02438 Eq. 16.
    """
    check_real("rewards", rewards)
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floating("values", values)
    check_mask("mask", mask)
    for name, x in (("values", values), ("mask", mask)):
        check_shape(name, x, tuple(rewards.shape), "the shape of rewards")
        check_same_device(name, x, "rewards", rewards)
    if not rewards.is_floating_point():  # 0 and 1 of a verifier
        rewards = rewards.float()
    gamma = check_between("gamma", gamma, 0, 1)
    lam = check_between("lam", lam, 0, 1)
    triton = use_triton(impl, rewards, auto_interprets=True) and not under_transform()
    if triton and rewards.numel() > 0:
        tokens = (layout.tokens(x) for x in (rewards, values, mask))
        found = _scan(*tokens, gamma, lam, layout.cu_seqlens)
    elif cu_seqlens is None:
        backend = "eager" if under_transform() else backend_of(impl, rewards, 0)
        found = _of_rows(rewards, values, mask, gamma, lam, backend)
    else:
        tokens = (x.reshape(-1) for x in (rewards, values, mask, layout.ids(rewards)))
        scan = reference.packed_gae if under_transform() else _eager_scan
        found = scan(*tokens, gamma=gamma, lam=lam)
    advantages, returns = (x.detach().view(rewards.shape) for x in found)
    return advantages, returns


def _of_rows(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "compiled" and rewards.numel() and not being_traced():
        with contextlib.suppress(NotCompiled):
            return compiled_rows.gae(rewards, values, mask, gamma=gamma, lam=lam)
    return reference.gae(rewards, values, mask, gamma=gamma, lam=lam)


@torch.library.custom_op("fastrlhf::gae", mutates_args=())
def _scan(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from fastrlhf.kernels.scan import gae as launch

    tokens = (token_contiguous(x) for x in (rewards, values, mask))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return launch(*tokens, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens)


# An operator, so that a graph does not hold the steps, whose number depends on that of the tokens.
@torch.library.custom_op("fastrlhf::packed_gae", mutates_args=())
def _eager_scan(
    rewards: Tensor, values: Tensor, mask: Tensor, ids: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    return reference.packed_gae(rewards, values, mask, ids, gamma=gamma, lam=lam)


@_eager_scan.register_fake
@_scan.register_fake
def _scan_fake(rewards, values, *_):
    dtype = reference.accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    advantages, returns = (
        torch.empty(rewards.shape, dtype=dtype, device=rewards.device) for _ in range(2)
    )
    return advantages, returns
