"""Generalised advantage estimation.

On a GPU a Triton kernel does it as a scan over tokens. Elsewhere rows go backwards step by step,
and packed tokens by the scan of `reference.packed_gae`.

Dims: B sequences, T tokens of each in rows, N tokens of all where they are packed.
"""

from typing import Any

import torch
from torch import Tensor

from fastrlhf import reference

from . import compiled_gae
from .backend import backend_of, is_batched, under_transform, use_triton
from .checks import (
    assert_on_device,
    check_between,
    check_floating,
    check_mask,
    check_real,
    check_same_device,
    check_shape,
    known_on_host,
    token_contiguous,
)
from .layout import layout_of
from .tracing import being_traced


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    returns_lam: float | Tensor | None = None,
    last_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Estimate the advantage of each token, and the return that its value should have predicted.

    Eager equivalent, for one sequence, where everything counts::

        values[T], advantages[T] = last_value, 0  # the last value is 0 where there is none
        for t in reversed(range(T)):
            delta = rewards[t] + gamma * values[t + 1] - values[t]
            advantages[t] = delta + gamma * lam * advantages[t + 1]
        returns = advantages + values

    Args:
        rewards: (B, T), or with cu_seqlens (N,) or (1, N) as all below; see `shaped_rewards`.
        values: (B, T) that the value model gave when the tokens were sampled.
        mask: (B, T) bool or 0/1, the tokens that count. The others can hold anything and may stand
            anywhere: they are skipped, as if the tokens around them followed each other.
        gamma: discount in [0, 1].
        lam: λ in [0, 1], between one-step (0) and Monte Carlo estimates (1). Or (B,), one for each
            sequence: see `length_adaptive_lambda`.
        returns_lam: λ of the returns, a number or (B,), which are then computed in a pass of their
            own. In this decoupled form the value model learns Monte Carlo returns (1.0). None: lam.
        last_values: (B,) floating, the value after the last token of a sequence that was cut there;
            it has to be 0 where the sequence ended. None: all ended.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last. Each
            sequence is estimated on its own.
        impl: "auto" (Triton on a GPU, and under TRITON_INTERPRET=1; else eager PyTorch), "triton",
            "compiled" (eager PyTorch for packed sequences) or "eager".

    Returns:
        advantages and returns, each of the shape of rewards, fp32 (fp64 if rewards or values are),
        0 outside of the mask; not differentiable. Under torch.func.vmap and other transforms it is
        plain PyTorch.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; gamma or lam outside
            [0, 1] (for lam (B,) on a GPU, an assertion there instead).

    Source: 1506.02438 Eq. 16; 2504.05118 (VAPO) for λ of each sequence and of the returns.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
        >>> mask = torch.ones(1, 3)
        >>> advantages, returns = fastrlhf.gae(rewards, values, mask, gamma=1.0, lam=0.5)
        >>> advantages, returns
        (tensor([[0.1250, 0.2500, 0.5000]]), tensor([[0.6250, 0.7500, 1.0000]]))
    """
    check_real("rewards", rewards)
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floating("values", values)
    check_mask("mask", mask)
    for name, x in (("values", values), ("mask", mask)):
        check_shape(name, x, tuple(rewards.shape), "the shape of rewards")
        check_same_device(name, x, "rewards", rewards)
    if not rewards.is_floating_point():  # a verifier may give integers, 0 and 1
        rewards = rewards.float()
    gamma = check_between("gamma", gamma, 0, 1)
    lams = [_check_lam("lam", lam, rewards, layout)]
    if returns_lam is not None:
        lams.append(_check_lam("returns_lam", returns_lam, rewards, layout))
    if last_values is not None:
        check_floating("last_values", last_values)
        last_values = _of_sequences("last_values", last_values, rewards, layout)
    of_lams = [_estimates(rewards, values, mask, gamma, x, last_values, layout, impl) for x in lams]
    (advantages, _), (_, returns) = of_lams[0], of_lams[-1]
    return advantages.detach().view(rewards.shape), returns.detach().view(rewards.shape)


def _estimates(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None,
    layout: reference.Layout,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns, in a shape that the caller changes to that of rewards."""
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "last_values": last_values}
    triton = use_triton(impl, rewards, auto_interprets=True) and not under_transform()
    if triton and rewards.numel() > 0:
        tokens = (layout.tokens(x) for x in (rewards, values, mask))
        return _scan(*tokens, gamma, *_apart(lam), last_values, layout.cu_seqlens)
    if layout.cu_seqlens is None:
        by_compiled = not under_transform() and backend_of(impl, rewards, 0) == "compiled"
        by_compiled = by_compiled and rewards.numel() > 0 and not being_traced()
        return (compiled_gae if by_compiled else reference).gae(rewards, values, mask, **options)
    tokens = (x.reshape(-1) for x in (rewards, values, mask, layout.ids(rewards)))
    if under_transform():
        return reference.packed_gae(*tokens, **options)
    return _eager_scan(*tokens, gamma, *_apart(lam), last_values)


def _apart(lam: float | Tensor) -> tuple[float, Tensor | None]:
    """Return λ as two arguments: a number, and the λ (B,) of sequences or None. If there are λ of
    sequences, the number is ignored.
    """
    return (0.0, lam) if isinstance(lam, Tensor) else (lam, None)


def _check_lam(
    name: str, lam: float | Tensor, rewards: Tensor, layout: reference.Layout
) -> float | Tensor:
    if not isinstance(lam, Tensor):
        return check_between(name, lam, 0, 1)
    check_floating(name, lam)
    if lam.ndim == 0:
        raise TypeError(
            f"{name}: expected a number, or a tensor of shape (B,), got one of shape ()"
        )
    lam = _of_sequences(name, lam, rewards, layout)
    fits = (lam >= 0) & (lam <= 1)
    if known_on_host(lam):
        if not fits.all():
            worst = lam[~fits][0].item()
            raise ValueError(f"{name}: expected numbers in [0, 1], got {worst}")
    elif not is_batched(lam):
        assert_on_device(fits.all(), f"{name}: expected numbers in [0, 1]")
    return lam


def _of_sequences(name: str, x: Tensor, rewards: Tensor, layout: reference.Layout) -> Tensor:
    """Check numbers (B,) of sequences, and return them detached and contiguous, as backends need
    them.
    """
    check_shape(name, x, (layout.sequences(rewards),), "one for each sequence")
    check_same_device(name, x, "rewards", rewards)
    return x.detach().contiguous()


@torch.library.custom_op("fastrlhf::gae", mutates_args=())
def _scan(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    lams: Tensor | None = None,
    last_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from fastrlhf.kernels.scan import gae as launch

    tokens = (token_contiguous(x) for x in (rewards, values, mask))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return launch(
        *tokens, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, lams=lams, last_values=last_values
    )


# This is an operator so that a compiled graph does not contain the steps of the scan, whose number
# depends on the number of tokens.
@torch.library.custom_op("fastrlhf::packed_gae", mutates_args=())
def _eager_scan(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    ids: Tensor,
    gamma: float,
    lam: float,
    lams: Tensor | None = None,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    of_all = lam if lams is None else lams
    return reference.packed_gae(
        rewards, values, mask, ids, gamma=gamma, lam=of_all, last_values=last_values
    )


@_eager_scan.register_fake
@_scan.register_fake
def _scan_fake(rewards, values, *_):
    dtype = reference.accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    advantages, returns = (
        torch.empty(rewards.shape, dtype=dtype, device=rewards.device) for _ in range(2)
    )
    return advantages, returns
