"""The inputs of a model's forward, and which of its tokens are scored.

Every function `model_*` makes a `TokenBatch` here and hands it to `at_head.py`; `packing.py` has
what concerns packed sequences.
"""

import inspect
import typing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrlhf.ops.checks import (
    assert_on_device,
    check_dense,
    check_indices_on_host,
    check_integer,
    check_mask,
    check_same_device,
    check_shape,
    known_on_host,
    wide_integers,
)
from fastrlhf.ops.kept_ids import Support, checked_support

from .head_parts import text_config, virtual_tokens

# Keywords that transformers' models pass on from **kwargs, whatever the model.
_PASSED_ON = {
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position",
    "adapter_names",
}  # fmt: skip
# What forwards call the keys and values of tokens before: since transformers 5.24 the second, and
# they take the first still.
CACHES = ("past_key_values", "cache")


class TokenBatch(NamedTuple):
    """The inputs of a model, which of its tokens are scored, and how."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor | None
    inputs: dict[str, Any]  # what else the model's forward takes
    mask: Tensor | None = None  # (B, T)
    cu_seqlens: Tensor | None = None  # borders of packed sequences, where B is 1
    temperature: float | Tensor = 1.0
    chunk_size: int | None = None
    impl: str = "auto"
    support: Support | None = None  # of the tokens (B, T-1) after the first
    rows: Tensor | None = None  # (B, T-1) the positions that predict these tokens
    options: tuple[str, ...] = ()  # names that the loss takes as keywords, for an error message


# Keywords that forwards of transformers take, and what to do instead of giving them.
_REFUSED = {
    "labels": "since there are no logits to take a loss of; the tokens to score are those of "
    "`mask`: labels != -100",
    "num_items_in_batch": "since there is no loss of labels; the losses take it as `normalizer`",
    "support": "since a divergence is of the whole vocabulary, whatever a sampler kept of it",
    "rows": "since a divergence is taken where each position predicts the token after it",
    "is_causal": "since a token is predicted from those before it",
    "logits_to_keep": "since `mask` says which tokens are scored",
    "num_logits_to_keep": "since `mask` says which tokens are scored",
}


def check_model(base: Any, name: str) -> None:
    """Refuse a model whose logits are not those of the tokens that follow.

    Raises:
        TypeError: an encoder-decoder.
    """
    config = base.config
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"model: {name} is an encoder-decoder: its logits are of decoder_input_ids, not of "
            "input_ids; use head_inputs, which gives the decoder's states, with targets of your own"
        )


def check_keywords(base: nn.Module, inputs: dict[str, Any], options: tuple[str, ...] = ()) -> None:
    """Refuse keywords that the model's forward would swallow without a word.

    Raises:
        ValueError: labels, and others that only a loss of logits would look at, or that change
            which logits there are.
        TypeError: a keyword that the forward does not name.
    """
    for name, instead in _REFUSED.items():
        # logits_to_keep may be a number. If it leaves out tokens, that is found at the head, where
        # there are too few hidden states.
        given = inputs.get(name) is not None
        if given and not ("to_keep" in name and isinstance(inputs[name], int)):
            raise ValueError(f"{name}: expected none, {instead}")
    parameters = _parameters(base)
    known = _PASSED_ON.union(parameters)
    if known.intersection(CACHES):
        known.update(CACHES[:1])
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            for typed in (parameter.annotation, *typing.get_args(parameter.annotation)):
                known.update(getattr(typed, "__annotations__", ()))
    if "input_ids" not in inspect.signature(type(base).forward).parameters:
        known.update(name for name in inputs if "mask" not in name)
    for name in inputs:
        if name not in known:
            hint = "; the mask of the tokens to score is `mask`" if "mask" in name else ""
            if options:
                hint += f", and the loss no such option; it has {', '.join(options)}"
            raise TypeError(
                f"{name}: the forward of {type(base).__name__} takes no argument of that name{hint}"
            )


def given_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Leave out keywords that are None, which stands for one that is not given."""
    return {name: value for name, value in inputs.items() if value is not None}


def _parameters(base: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a model's forward; where it was patched and hides them, also those
    of its backbone's forward.
    """
    parameters = dict(inspect.signature(type(base).forward).parameters)
    if "input_ids" not in parameters:
        backbone = getattr(base, "base_model", base)
        parameters |= inspect.signature(type(backbone).forward).parameters
    return parameters


def check_ids(input_ids: Tensor) -> None:
    check_integer("input_ids", input_ids)
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            "input_ids: expected shape (B, T), neither 0 (packed sequences are (1, N)), got "
            f"{tuple(input_ids.shape)}"
        )
    if input_ids.is_meta:
        raise ValueError("input_ids: expected ids, got a tensor on the meta device")


def of_positions(name: str, x: Tensor, input_ids: Tensor) -> Tensor:
    """Align a tensor of the tokens input_ids[:, 1:] with the positions that predict them: each of T
    positions has the number of the token after it, and the last one, which predicts nothing, 0.

    Raises:
        TypeError, ValueError: a tensor of another shape than (B, T-1).
    """
    check_dense(name, x)
    sequences, tokens = input_ids.shape
    expected = (sequences, tokens - 1)
    if tuple(x.shape) != expected:
        hint = ""
        if tuple(x.shape) == (sequences, tokens):
            hint = (
                f"; where entry t is of token t, give {name}[:, 1:]; where it is of the token "
                f"after t, as shift_targets aligns, {name}[:, :-1]"
            )
        raise ValueError(
            f"{name}: expected shape {expected}, one for each of the tokens input_ids[:, 1:], as "
            f"model_token_stats returns them, got {tuple(x.shape)}{hint}"
        )
    return torch.cat((x, x.new_zeros((sequences, 1))), dim=1)


def support_of_positions(support: Support, targets: Tensor, ignored: int) -> Support:
    """Give each of T positions, whose targets are (B, T), the ids that the token after it may be,
    and the last one none.

    Raises:
        TypeError, ValueError: a support that is not one of the tokens input_ids[:, 1:], by their
            numbers.
    """
    sequences, tokens = targets.shape
    like = "one for each of the tokens input_ids[:, 1:], flattened, and the end"
    # Whether its ids are in the vocabulary is checked where the logits are made.
    kept = checked_support(support, targets[:, :-1], None, ignored, like=like)
    ids, offsets = support[0], kept.offsets
    place = torch.arange(tokens, device=offsets.device)
    first = torch.arange(sequences, device=offsets.device).unsqueeze(1) * (tokens - 1)
    return ids, torch.cat((offsets[(first + place).reshape(-1)], offsets[-1:]))


def rows_of_positions(rows: Tensor, scored: Tensor) -> Tensor:
    """Number the positions (B, T-1) that predict the tokens after the first as if flat, (B, T)
    with those of the last ones, which predict nothing; anything for tokens that are not scored.

    Raises:
        TypeError, ValueError: rows that are not integer, of another shape or device; of a token
            that is scored, outside of [0, T) or not before the token.
    """
    check_integer("rows", rows)
    sequences, tokens = scored.shape
    check_shape(
        "rows", rows, (sequences, tokens - 1), "one for each of the tokens input_ids[:, 1:]"
    )
    check_same_device("rows", rows, "input_ids", scored)
    wanted, rows = scored[:, 1:], wide_integers(rows)
    of_scored = torch.where(wanted, rows, 0)
    check_indices_on_host("rows", of_scored, tokens, "positions in a row of input_ids")
    position = torch.arange(1, tokens, device=rows.device).expand(rows.shape)
    late = wanted & (rows >= position)
    if known_on_host(late) and late.any():
        raise ValueError(
            "rows: expected a position before that of the token which it predicts, got "
            f"{int(rows[late][0])} for the token at {int(position[late][0])}"
        )
    # An assertion on the device, since the checks above look at the CPU only.
    inside = (of_scored >= 0) & (of_scored < tokens)
    assert_on_device((inside & ~late).all(), "rows: outside of the tokens, or not before one's own")
    first = torch.arange(sequences, device=rows.device).unsqueeze(1) * tokens
    flat = first + of_scored.clamp(0, tokens - 1)
    return torch.cat((flat, flat.new_zeros((sequences, 1))), dim=1)


def with_rows_of_positions(batch: TokenBatch, scored: Tensor) -> TokenBatch:
    """Check a batch whose tokens say which positions predict them, as in a tree of sequences.

    Raises:
        TypeError, ValueError: rows that do not fit; cu_seqlens, whose sequences share nothing.
    """
    assert batch.rows is not None
    if batch.cu_seqlens is not None:
        raise ValueError(
            "rows: expected None with cu_seqlens, whose sequences share no positions; give "
            "position_ids and an attention_mask (B, 1, T, T) that says what each token sees"
        )
    return batch._replace(rows=rows_of_positions(batch.rows, scored))


def scored_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """Decide which of the tokens (B, T) are scored, and check what says so. `rows`: the positions
    (B, T-1) that predict them, where those are not the ones before.
    """
    scored = _wanted_tokens(input_ids, attention_mask, mask, rows)
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
        # Where positions start again, another document begins, whose first token nothing predicts.
        scored = scored.expand(input_ids.shape).clone()
        scored[:, 1:] &= position_ids[:, 1:] > position_ids[:, :-1]
    return scored


def _wanted_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, mask: Tensor | None, rows: Tensor | None
) -> Tensor:
    if mask is not None:
        check_mask("mask", mask)
        _check_mask_of_tokens(mask, input_ids)
        return mask != 0
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(
            "attention_mask: expected a tensor (or give `mask`, which says what to score), got "
            f"{type(attention_mask).__name__}"
        )
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.ones_like(input_ids, dtype=torch.bool)
    check_mask("attention_mask", attention_mask)
    check_shape("attention_mask", attention_mask, tuple(input_ids.shape), "that of input_ids")
    attended = attention_mask != 0
    scored = attended.clone()
    # The first token after padding on the left would be predicted from padding.
    if rows is None or rows.shape != (len(attended), attended.shape[1] - 1):
        scored[:, 1:] &= attended[:, :-1]
    else:
        scored[:, 1:] &= attended.gather(1, rows.long().clamp(0, attended.shape[1] - 1))
    return scored


def _check_mask_of_tokens(mask: Tensor, input_ids: Tensor) -> None:
    sequences, tokens = input_ids.shape
    hint = "the shape of input_ids"
    if tuple(mask.shape) == (sequences, tokens - 1):
        hint += "; for a mask of input_ids[:, 1:], put a column of zeros before it"
    check_shape("mask", mask, (sequences, tokens), hint)


def with_positions(
    base: Any, attention_mask: Tensor | None, inputs: dict[str, Any], model: Any
) -> dict[str, Any]:
    """Give sequences that are padded on the left the positions that they have without padding.

    On a GPU, what the mask holds is awaited, unless positions are given.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return inputs
    goes_on = any(inputs.get(name) is not None for name in CACHES)
    if "position_ids" in inputs or goes_on or _has_no_positions(base, model):
        return inputs
    if not bool((attention_mask[:, 0] == 0).any()) or _counts_padding_itself(base):
        return inputs
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions}


def makes_own_positions(base: Any, model: Any) -> bool:
    """Whether a model's positions are its own: of images, of padding, of virtual tokens."""
    return _has_no_positions(base, model) or _counts_padding_itself(base)


def _has_no_positions(base: Any, model: Any) -> bool:
    return (
        "position_ids" not in _parameters(base)
        or text_config(base) is not base.config
        or virtual_tokens(model) > 0
    )


def _counts_padding_itself(base: nn.Module) -> bool:
    """Whether a model makes positions of input_ids and leaves out padding, as RoBERTa does."""
    return any(hasattr(part, "create_position_ids_from_input_ids") for part in base.modules())
