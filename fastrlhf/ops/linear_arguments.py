"""Checks of the arguments that operations from hidden states share.

Here are the checks of hidden states, heads, rows and chunks; their errors name the public
arguments. Checks of a single number or tensor are in `checks.py`, and those of a loss's own
arguments in `fastrlhf/losses/`. `checked_problem` does all of them, and makes the `LinearProblem`
(`linear_problem.py`) that the plans work on.
"""

import torch
from torch import Tensor

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
    check_floating,
    check_indices_on_host,
    check_integer,
    check_same_device,
    check_shape,
    check_whole,
    known_on_host,
    wide_integers,
)
from .kept_ids import KeptIds, checked_support, said_with_support
from .linear_definition import one_state_a_token
from .linear_head import QuantizedWeight, Weight
from .linear_precision import autocast_decides, matmul_dtype
from .linear_problem import LinearInputs, LinearOptions, LinearProblem
from .linear_question import TokenQuestion
from .linear_rows import SharedRows, counts_are_unknown, default_chunk, shared_rows
from .logits_arguments import check_values_on_host
from .tracing import being_traced, replaced
from .transform import Transform, check_temperatures_on_host, checked_transform
from .vocabulary_part import IGNORED, VocabularyPart, agreed_part, numbered


def checked_problem(
    inputs: LinearInputs, targets: Tensor, question: TokenQuestion
) -> LinearProblem:
    """Check everything and convert the hidden states to the dtype of the matmuls.

    Where ranks share the vocabulary, the problem's targets are numbered from the first column of
    this rank's part.

    Raises:
        TypeError, ValueError: an argument that does not fit, named as in the public function.
    """
    any_dtype = inputs.dtype is not None
    check_head(inputs.hidden, inputs.weights, inputs.bias, any_dtype=any_dtype, part=inputs.part)
    _check_targets(inputs, targets)
    check_impl(inputs.impl)
    question = question.checked()
    targets = wide_integers(targets)
    inputs = _with_rows(inputs, targets, question.ignore_index)
    hidden, part, vocab = inputs.hidden, inputs.part, inputs.weights[0].shape[0]
    transform = checked_transform(inputs.temperature, inputs.softcap, inputs.scale, targets)
    tokens = transform.token_temperature
    chunk = checked_chunk(inputs.chunk_size, inputs.most_columns, hidden.device)
    here, ignore_index = targets, question.ignore_index  # `here`: targets as numbered on this rank
    if part is not None:
        _check_ranks_agree(inputs, targets, question, transform, chunk)
        here, ignore_index = part.own_targets(targets, ignore_index), IGNORED
    elif not being_traced():  # the operator on logits checks again
        check_values_on_host(targets, 1.0 if tokens is None else tokens, vocab, ignore_index)
    kept = _kept(inputs, targets, question.ignore_index)
    numbers = targets.numel() * vocab
    if kept is not None:
        numbers = kept.ids.numel() * hidden.shape[-1]
        at_once = inputs.chunk_size or max(1, targets.numel())
        chunk = checked_chunk(at_once, inputs.most_columns, hidden.device)
    entropy_grad = question.entropy and question.entropy_grad
    question = replaced(question, ignore_index=ignore_index, entropy_grad=entropy_grad)
    dtype = inputs.dtype or matmul_dtype(hidden)
    options = LinearOptions(
        *transform[1:], question, chunk, backend_of(inputs.impl, hidden, numbers), dtype, part,
        _shared_rows(inputs, here, transform, ignore_index),
    )  # fmt: skip
    return LinearProblem(hidden.to(dtype), inputs.weights, inputs.bias, here, tokens, options, kept)


def _check_targets(inputs: LinearInputs, targets: Tensor) -> None:
    hidden = inputs.hidden
    check_integer("targets", targets)
    if inputs.rows is None:
        without_width = "hidden without its last dimension"
        check_shape("targets", targets, tuple(hidden.shape[:-1]), without_width)
    check_same_device("targets", targets, "hidden", hidden)


def _with_rows(inputs: LinearInputs, targets: Tensor, ignore_index: int) -> LinearInputs:
    """Check which hidden state predicts each token, if tokens share them. Where sharing is not
    supported (see below), each token gets a copy of its hidden state.
    """
    if inputs.rows is None:
        return inputs
    rows = checked_rows(inputs.rows, inputs.hidden, targets, ignore_index)
    if inputs.part is None and not under_transform() and not counts_are_unknown(targets):
        return replaced(inputs, rows=rows)
    return replaced(inputs, hidden=one_state_a_token(inputs.hidden, rows, targets), rows=None)


def _check_ranks_agree(
    inputs: LinearInputs, targets: Tensor, question: TokenQuestion, transform: Transform, chunk: int
) -> None:
    """Check that ranks which share the vocabulary ask the same about the same tokens."""
    part, hidden = inputs.part, inputs.hidden
    assert part is not None
    triton = use_triton(inputs.impl, hidden)
    # Which gradients are wanted decides what ranks send each other, so ranks must agree on it.
    yes_and_no = (triton, *question.yes_and_no, *inputs.wanted_gradients)
    dtype = inputs.dtype or matmul_dtype(hidden)
    compared = {"chunk_size": chunk, **numbered(yes_and_no, dtype, *transform[1:])}
    live, tokens = targets != question.ignore_index, transform.token_temperature
    scored = torch.where(live, targets, IGNORED)
    scored = said_with_support(scored, inputs.support, targets.numel())
    outside_of_graphs(agreed_part)(part.group, part.size, scored, compared, part, tokens)
    check_temperatures_on_host(tokens, live)


def _kept(inputs: LinearInputs, targets: Tensor, ignore_index: int) -> KeptIds | None:
    """Check the ids to which tokens are restricted, if any; numbered in the whole vocabulary."""
    if inputs.support is None:
        return None
    part = inputs.part
    vocab = inputs.weights[0].shape[0] if part is None else part.vocab
    return checked_support(inputs.support, targets, vocab, ignore_index)


def checked_rows(rows: Tensor, hidden: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Return the numbers of the hidden states (U, K) that predict the targets (...), flattened.
    Those of ignored targets, which may be anything, become 0.

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
    inputs: LinearInputs, targets: Tensor, transform: Transform, ignore_index: int
) -> SharedRows | None:
    """Number the states of tokens (see `SharedRows`). The temperatures of ignored tokens, which may
    be anything, make no states of their own.
    """
    if inputs.rows is None:
        return None
    temperature = transform.flat(inputs.hidden.dtype).token_temperature
    if temperature is not None:
        temperature = torch.where(targets.reshape(-1) == ignore_index, 1.0, temperature)
    return shared_rows(inputs.rows, temperature, len(inputs.hidden))


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
        TypeError, ValueError: an argument that does not fit, named as in the public function.
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
        if not (any_dtype or weight.dtype == hidden.dtype or autocast_decides(hidden)):
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
