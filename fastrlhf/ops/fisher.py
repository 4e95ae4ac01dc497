"""The Fisher information of the softmax times a tangent, from logits or from hidden states.

The operator views both as rows (`rows`) and calls the launcher of a backend: of
`kernels/fisher.py`, `compiled_fisher` or `eager_fisher`.

Dims: N rows, H hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf import reference

from . import compiled_fisher, eager_fisher
from .backend import (
    backend_of,
    check_impl,
    outside_of_graphs,
    refuse_transforms,
    under_transform,
)
from .checks import check_floating, check_same_device, check_shape
from .eager_fisher import room_for_product
from .head_gradients import as_operands
from .linear_arguments import check_head, checked_chunk
from .linear_head import Head, Weight
from .linear_precision import exact, matmul_dtype
from .linear_rows import even_spans, live_rows
from .logits_arguments import check_logits, checked_rows
from .rows import rows_of
from .sharded import is_dtensor
from .transform import check_temperatures_on_host, checked_transform, flat_temperature


@torch.no_grad()
def softmax_fisher_product(
    logits: Tensor,
    tangent: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Multiply the Fisher information of each token's distribution by a tangent of its logits.

    It is the Hessian of the KL divergence from that distribution, in both directions, and
    diag(p) - p pᵀ over T².

    Eager equivalent::

        p = (logits / temperature).softmax(-1)
        product = p * (tangent - (p * tangent).sum(-1, keepdim=True)) / temperature**2
        quadratic = (product * tangent).sum(-1)

    Args:
        logits: (..., V) floating, any strides.
        tangent: (..., V) floating, u: the direction in which the logits move.
        temperature: positive number, or a tensor of one for each token or sequence, as that of
            `token_stats`.
        mask: (...) bool or 0/1; where it is 0, nothing is read and both results are 0. None:
            everything counts.
        impl: as `token_stats`.

    Returns:
        product (..., V) in the dtype of the tangent, and quadratic (...), which is the variance of
        the tangent, fp32 (fp64 if an input is); neither is differentiable. A constant tangent,
        which changes no probability, gives 0 up to rounding.

    Under torch.func.vmap and other transforms it is plain PyTorch.

    One launch reads logits and tangent twice, the second time from the cache as far as the rows in
    flight fit there, and writes the product once; the product is all that is allocated.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a temperature that is not
            positive.

    Source: 1502.05477 appendix C.

    Example:
        >>> logits, tangent = torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> product, quadratic = fastrlhf.softmax_fisher_product(logits, tangent)
        >>> product, quadratic
        (tensor([[ 0.1875, -0.0625, -0.0625, -0.0625]]), tensor([0.1875]))
    """
    check_floating("logits", logits)
    check_floating("tangent", tangent)
    check_logits(logits)
    check_shape("tangent", tangent, tuple(logits.shape), "the shape of logits")
    check_same_device("tangent", tangent, "logits", logits)
    mask = checked_rows(mask, logits, "logits")
    check_impl(impl)
    transform = checked_transform(temperature, None, 1.0, mask)
    if under_transform():
        check_temperatures_on_host(transform.token_temperature, mask)
        product, quadratic = reference.fisher_product(
            logits, tangent, mask, temperature=transform.of_rows
        )
        return product.to(tangent.dtype).detach(), quadratic.detach()
    product, quadratic = _product(logits, tangent, mask, *transform[:2], impl)
    return product.view(logits.shape), quadratic.view(mask.shape)


@torch.library.custom_op("fastrlhf::fisher_product", mutates_args=())
def _product(
    logits: Tensor,
    tangent: Tensor,
    mask: Tensor,
    token_temperature: Tensor | None,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    check_temperatures_on_host(token_temperature, mask)
    keep, dtype = mask.reshape(-1).contiguous(), tangent.dtype
    acc = reference.accumulation_dtype(torch.promote_types(logits.dtype, dtype))
    rows_t = flat_temperature(token_temperature, temperature, acc)
    sides = rows_of(logits), rows_of(tangent)
    backend = backend_of(impl, logits, logits.numel())
    if keep.numel() == 0:
        return room_for_product(*sides, keep, dtype)
    return _launcher(backend)(*sides, keep, temperature=rows_t, dtype=dtype)


def _launcher(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Choose the backend."""
    if backend == "triton":
        from fastrlhf.kernels.fisher import fisher_product

        return fisher_product
    row_work = compiled_fisher if backend == "compiled" else eager_fisher
    return row_work.fisher_product


@_product.register_fake
def _product_fake(logits, tangent, mask, *_):
    acc = reference.accumulation_dtype(torch.promote_types(logits.dtype, tangent.dtype))
    product = torch.empty((mask.numel(), logits.shape[-1]), dtype=tangent.dtype, device=mask.device)
    return product, torch.empty(mask.numel(), dtype=acc, device=mask.device)


@torch.no_grad()
def linear_softmax_fisher_product(
    hidden: Tensor,
    weight: Weight,
    tangent: Tensor,
    *,
    weight_tangent: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Multiply the Fisher information of a linear head's distributions by a tangent of its inputs.

    Eager equivalent, with the logits that `linear_token_stats` makes of hidden states, and their
    slope, the derivative of softcap and scale::

        moved = slope * (tangent @ weight.T)
        product, quadratic = softmax_fisher_product(logits, moved, ...)
        product = (slope * product) @ weight

    Args:
        hidden: (..., H) of a dtype that the head's matmuls take.
        weight: (V, H).
        tangent: (..., H) of the same dtype, how the hidden states move.
        weight_tangent: (V, H) how the weight moves, in addition; None for a frozen head.
        bias, softcap, scale, chunk_size: as `linear_token_stats`.
        temperature, mask, impl: as `softmax_fisher_product`.

    Returns:
        product (..., H), what F makes of the tangent, pulled back to the hidden states, and
        quadratic (...); fp32 (fp64 for fp64). Not differentiable.

    Cost, in matmuls G of the tokens of the mask: 3G, and 1G more with a weight_tangent. Memory: two
    blocks of logits. On a GPU, the count of tokens is awaited once.

    Raises:
        TypeError, ValueError: as `linear_token_stats` and `softmax_fisher_product`.
        RuntimeError: under a torch.func transform.

    Source: as `softmax_fisher_product`.

    Example:
        >>> hidden, weight = torch.ones(1, 2), torch.zeros(4, 2)
        >>> tangent = torch.tensor([[1.0, 0.0]])
        >>> products = fastrlhf.linear_softmax_fisher_product(hidden, weight, tangent)
        >>> products[0].shape, products[1].shape
        (torch.Size([1, 2]), torch.Size([1]))
    """
    refuse_transforms("linear_softmax_fisher_product", "softmax_fisher_product")
    if is_dtensor(weight):
        raise TypeError("weight: expected a plain tensor, got a DTensor, which this does not take")
    check_head(hidden, [weight], bias)
    check_floating("tangent", tangent)
    check_shape("tangent", tangent, tuple(hidden.shape), "the shape of hidden")
    check_same_device("tangent", tangent, "hidden", hidden)
    if weight_tangent is not None:
        check_floating("weight_tangent", weight_tangent)
        check_shape("weight_tangent", weight_tangent, tuple(weight.shape), "the shape of weight")
        check_same_device("weight_tangent", weight_tangent, "hidden", hidden)
    mask = checked_rows(mask, hidden, "hidden")
    check_impl(impl)
    transform = checked_transform(temperature, softcap, scale, mask)
    chunk = checked_chunk(chunk_size, weight.shape[0], hidden.device)
    impl = backend_of(impl, hidden, mask.numel() * weight.shape[0])
    dtype = matmul_dtype(hidden)
    head = Head([weight], bias, dtype)
    moving = Head([weight], None, dtype)
    tangent_head = None if weight_tangent is None else Head([weight_tangent.to(dtype)], None, dtype)
    flat, flat_tangent = (x.reshape(-1, x.shape[-1]).to(dtype) for x in (hidden, tangent))
    product = torch.zeros(flat.shape, dtype=head.sums, device=hidden.device)
    quadratic = torch.zeros(mask.numel(), dtype=head.sums, device=hidden.device)
    order = outside_of_graphs(live_rows)(mask.reshape(-1).to(torch.int64), 0)
    temperatures = flat_temperature(transform.token_temperature, 1.0, head.sums)
    with exact(hidden):
        for first, last in even_spans(order.shape[0], chunk):
            rows = order[first:last]
            h, t = (x[rows].to(head.operands) for x in (flat, flat_tangent))
            x, moved = head.logits(h), moving.logits(t)
            if tangent_head is not None:
                moved += tangent_head.logits(h)
            slope: float | Tensor = transform.scale
            if transform.softcap is not None:
                slope = reference.cap_slope(x, transform.softcap, transform.scale)
                slope = slope.mul_(transform.scale)
            of_rows = temperatures[rows] if isinstance(temperatures, Tensor) else None
            logits = reference.capped_logits(x, transform.softcap, transform.scale)
            every_row = rows >= 0
            d_logits, quadratic[rows] = torch.ops.fastrlhf.fisher_product(
                logits, moved.mul_(slope), every_row, of_rows, transform.temperature, impl
            )
            room = head.room(len(rows)) if head.operands != d_logits.dtype else None
            d_logits = as_operands(d_logits.mul_(slope), head.operands, room)
            product[rows] = head.pull_back(d_logits)
    return product.view(hidden.shape), quadratic.view(mask.shape)
