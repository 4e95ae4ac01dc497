"""The arguments that operations from hidden states share (these, the head, targets and options),
checked and ready for the plans.

What a single argument has to be, whatever it is for, is checked by `checks.py`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import FURTHER_STATS, accumulation_dtype

from .backend import (
    backend_of,
    check_impl,
    is_batched,
    outside_of_graphs,
    under_transform,
    use_triton,
)
from .checks import (
    assert_on_device,
    check_bool,
    check_floating,
    check_ignore_index,
    check_indices_on_host,
    check_integer,
    check_names,
    check_same_device,
    check_shape,
    check_whole,
    known_on_host,
    wide_integers,
)
from .kept_ids import KeptIds, Support, checked_support, said_with_support
from .linear_head import Head, QuantizedWeight, Weight
from .linear_plans import Workbench
from .linear_rows import (
    Rows,
    SharedRows,
    counts_are_unknown,
    default_chunk,
    live_rows_if_known,
    shared_rows,
)
from .logits_arguments import check_values_on_host
from .tracing import being_traced
from .transform import Transform, check_temperatures_on_host, checked_transform
from .vocabulary_part import IGNORED, VocabularyPart, agreed_part, numbered


class LinearOptions(NamedTuple):
    """What is no tensor."""

    temperature: float
    softcap: float | None
    scale: float
    ignore_index: int
    entropy: bool
    entropy_grad: bool  # the entropy is asked for, and a gradient of it
    with_stats: tuple[str, ...]  # what else is asked for
    chunk: int
    impl: str
    dtype: torch.dtype  # of the matmuls: that of the hidden states, or of autocast
    part: VocabularyPart | None = None  # of a vocabulary that ranks share
    lse: bool = True  # whether anybody looks at it
    shared: SharedRows | None = None  # where tokens share hidden states


class LinearProblem(NamedTuple):
    """Hidden states, the head, and what is asked about its logits."""

    hidden: Tensor  # (..., K) in the dtype of the matmuls
    weights: list[Weight]  # column blocks of a (V, K) matrix
    bias: Tensor | None  # (V,)
    targets: Tensor  # (...)
    token_temperature: Tensor | None  # (...)
    options: LinearOptions
    kept: KeptIds | None = None  # the ids that tokens may be; None: all

    @property
    def temperature(self) -> float | Tensor:
        """Of all tokens, or of each."""
        tokens = self.token_temperature
        return self.options.temperature if tokens is None else tokens

    @property
    def transform(self) -> Transform:
        """What happens to the logits, of flattened tokens."""
        options = self.options
        return Transform(
            self.token_temperature, options.temperature, options.softcap, options.scale
        ).flat(options.dtype)

    def order(self) -> Tensor | None:
        """The tokens with a target, those that share a hidden state together; None where they
        cannot be counted.
        """
        order = live_rows_if_known(self.targets.reshape(-1), self.options.ignore_index)
        if order is None or self.options.shared is None:
            return order
        return order[self.options.shared.state[order].argsort(stable=True)]

    def workbench(self, order: Tensor | None) -> Workbench:
        """Lay out the rows in an order: see `Rows`."""
        options = self.options
        head = Head(self.weights, self.bias, options.dtype)
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        targets = self.targets.reshape(-1)
        rows = Rows(hidden, targets, self.transform, options.ignore_index, order, options.shared)
        asked = (options.entropy, options.entropy_grad, options.with_stats)
        return Workbench(head, rows, *asked, options.impl, options.part)


def exact(hidden: Tensor) -> torch.autocast:
    """Keep autocast, whose dtype the operands have already, from rounding fp32 sums."""
    return torch.autocast(hidden.device.type, enabled=False)


def checked_problem(
    hidden: Tensor,
    weights: list[Weight],
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    entropy: bool,
    chunk_size: int | None,
    impl: str,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    part: VocabularyPart | None = None,
    support: Support | None = None,
    rows: Tensor | None = None,
    lse: bool = True,
) -> LinearProblem:
    """Check everything and convert the hidden states to the dtype of the matmuls.

    `dtype`: of the matmuls, to which weights of any dtype are converted a slice at a time; None: as
    `F.linear`, that of the hidden states and weights, or of autocast. `part`: of the vocabulary,
    that the weights are; the problem's targets are then the part's own. `lse`: whether anybody will
    look at it, without which kept ids need not be read where there is one.

    Raises:
        TypeError, ValueError: an argument that does not fit, by its public name.
    """
    check_head(hidden, weights, bias, any_dtype=dtype is not None, part=part)
    vocab = weights[0].shape[0]
    check_integer("targets", targets)
    if rows is None:
        without_width = "hidden without its last dimension"
        check_shape("targets", targets, tuple(hidden.shape[:-1]), without_width)
    check_same_device("targets", targets, "hidden", hidden)
    check_impl(impl)
    check_bool("entropy", entropy)
    check_bool("entropy_grad", entropy_grad)
    with_stats = check_names("with_stats", with_stats, FURTHER_STATS)
    ignore_index = check_ignore_index(ignore_index)
    targets = wide_integers(targets)
    if rows is not None:
        rows = checked_rows(rows, hidden, targets, ignore_index)
        if part is not None or under_transform() or counts_are_unknown(targets):
            hidden, rows = written_out(hidden, rows, targets), None
    transform = checked_transform(temperature, softcap, scale, targets)
    tokens = transform.token_temperature
    # Of the rank that has the most of a vocabulary that several share, so that all cut the same.
    columns = vocab if part is None or part.largest is None else part.largest
    chunk = checked_chunk(chunk_size, columns, hidden.device)
    kept = None
    numbered_by_all: tuple[Tensor, int | Tensor, int] = targets, vocab, ignore_index
    if part is not None:
        question = (
            use_triton(impl, hidden),
            entropy,
            entropy_grad,
            *(name in with_stats for name in FURTHER_STATS),
        )
        question += wanted_gradients(hidden, weights, bias)
        dtype_of_logits = dtype or matmul_dtype(hidden)
        asked = {"chunk_size": chunk, **numbered(question, dtype_of_logits, *transform[1:])}
        scored = torch.where(targets == ignore_index, IGNORED, targets)
        scored = said_with_support(scored, support, targets.numel())
        outside_of_graphs(agreed_part)(part.group, part.size, scored, asked, part, tokens)
        check_temperatures_on_host(tokens, targets != ignore_index)
        numbered_by_all = targets, part.vocab, ignore_index
        targets, ignore_index = part.own_targets(targets, ignore_index), IGNORED
    elif not being_traced():  # the operator on logits checks again
        check_values_on_host(targets, 1.0 if tokens is None else tokens, vocab, ignore_index)
    numbers = targets.numel() * vocab
    if support is not None:
        kept = checked_support(support, *numbered_by_all)
        numbers = kept.ids.numel() * hidden.shape[-1]
        chunk = checked_chunk(chunk_size or max(1, targets.numel()), columns, hidden.device)
    # Of all blocks, the last and smallest included.
    impl = backend_of(impl, hidden, numbers)
    options = LinearOptions(
        *transform[1:], ignore_index, entropy, entropy and entropy_grad, with_stats,
        chunk, impl, dtype or matmul_dtype(hidden), part, lse,
        None if rows is None else _shared_rows(rows, hidden, targets, transform, ignore_index),
    )  # fmt: skip
    return LinearProblem(
        hidden.to(options.dtype), weights, bias, targets, transform.token_temperature, options, kept
    )


def checked_rows(rows: Tensor, hidden: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Return the rows of hidden states (U, K) that predict targets (...), flattened; those of
    ignored targets, which may be anything, as 0.

    Raises:
        TypeError, ValueError: rows that are not integer, of another shape or device than the
            targets, or outside [0, U); hidden states that are not (U, K).
    """
    check_integer("rows", rows)
    check_shape("rows", rows, tuple(targets.shape), "the shape of targets")
    check_same_device("rows", rows, "hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden: expected shape (U, H), whose rows are numbered, got {tuple(hidden.shape)}"
        )
    live = (targets != ignore_index).reshape(-1)
    flat = torch.where(live, wide_integers(rows).reshape(-1), 0)
    check_indices_on_host(
        "rows", flat[live] if known_on_host(live) else flat, len(hidden), "rows of hidden"
    )
    if not known_on_host(live) and not being_traced() and not is_batched(flat):
        assert_on_device(
            ((flat >= 0) & (flat < len(hidden)) | ~live).all(),
            "rows: outside of the rows of hidden",
        )
    return flat


def _shared_rows(
    rows: Tensor, hidden: Tensor, targets: Tensor, transform: Transform, ignore_index: int
) -> SharedRows:
    """Number the states of tokens; ignored ones, which may have any temperature, make none."""
    temperature = transform.flat(hidden.dtype).token_temperature
    if temperature is not None:
        temperature = torch.where(targets.reshape(-1) == ignore_index, 1.0, temperature)
    return shared_rows(rows, temperature, len(hidden))


def written_out(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """A hidden state (..., K) for each target, of those (U, K) that they share."""
    if len(hidden) == 0:  # of ignored tokens alone, which are all of the first one
        hidden = torch.cat((hidden, hidden.new_zeros(1, hidden.shape[1])))
    return hidden[rows].view(*targets.shape, hidden.shape[1])


def wanted_gradients(
    hidden: Tensor, weights: list[Weight], bias: Tensor | None
) -> tuple[bool, bool]:
    """Whether gradients of hidden states and of the head will be asked for, on which it depends
    what is sent.
    """
    grad = torch.is_grad_enabled()
    head = any(x is not None and x.requires_grad for x in (bias, *weights))
    return grad and hidden.requires_grad, grad and head


def check_head(
    hidden: Tensor,
    weights: list[Weight],
    bias: Tensor | None,
    *,
    prefix: str = "",
    any_dtype: bool = False,
    part: VocabularyPart | None = None,
) -> None:
    """Check hidden states (..., K), the column blocks of a head (V, K) and its bias (V,).

    Raises:
        TypeError, ValueError: an argument that does not fit, by its public name.
    """
    name = f"{prefix}hidden"
    check_floating(name, hidden)
    for weight in weights:
        _check_weight(weight, hidden, prefix, any_dtype, may_be_empty=part is not None)
    vocab, width = weights[0].shape[0], sum(weight.shape[1] for weight in weights)
    if hidden.ndim == 0 or hidden.shape[-1] != width:
        raise ValueError(
            f"{name}: expected shape (..., {width}), the width of the {prefix}weight "
            f"{(vocab, width)}, got {tuple(hidden.shape)}"
        )
    if bias is not None:
        check_floating(f"{prefix}bias", bias)
        check_shape(f"{prefix}bias", bias, (vocab,), f"one for each row of the {prefix}weight")
        check_same_device(f"{prefix}bias", bias, name, hidden)


def _check_weight(
    weight: Weight, hidden: Tensor, prefix: str, any_dtype: bool, *, may_be_empty: bool
) -> None:
    name = f"{prefix}weight"
    if not isinstance(weight, QuantizedWeight):
        check_floating(name, weight)
        if not (any_dtype or weight.dtype == hidden.dtype or _autocast(hidden)):
            raise TypeError(
                f"{name}: expected {hidden.dtype}, the dtype of {prefix}hidden, got {weight.dtype}"
            )
    if weight.ndim != 2 or 0 in weight.shape[1 if may_be_empty else 0 :]:
        raise ValueError(f"{name}: expected shape (V, H), neither 0, got {tuple(weight.shape)}")
    if weight.device != hidden.device:
        raise ValueError(
            f"{name}: expected on {hidden.device}, the device of {prefix}hidden, got "
            f"{weight.device}"
        )


def checked_chunk(chunk_size: int | None, vocab: int, device: torch.device) -> int:
    if chunk_size is None:
        return default_chunk(vocab, device)
    return check_whole("chunk_size", chunk_size, 1)


def _autocast(hidden: Tensor) -> bool:
    """Whether autocast decides the dtype of a matmul of hidden: it leaves fp64 alone."""
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of a matmul of hidden states: theirs, or that of autocast."""
    return torch.get_autocast_dtype(hidden.device.type) if _autocast(hidden) else hidden.dtype


def full_logits(
    hidden: Tensor, weight: Weight, bias: Tensor | None, live: Tensor, dtype: torch.dtype
) -> Tensor:
    """Make all logits (..., V) of a head in plain PyTorch: 0 where a token is not live.

    Multiplied as `dtype`, and like the logits of a `Head` added up in fp32 or fp64: call it in
    `exact`.
    """
    sums = accumulation_dtype(dtype)
    # What other rows hold must not reach the gradient of the weight, a sum over rows.
    operand = torch.where(live.unsqueeze(-1), hidden, 0.0).to(dtype).to(sums)
    logits = operand @ weight[0 : weight.shape[0]].to(dtype).to(sums).T
    return logits if bias is None else logits + bias.to(sums)
