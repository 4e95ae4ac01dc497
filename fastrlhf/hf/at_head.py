"""Run a causal language model, with other work in place of the call of its head.

The statistics of a model's tokens, or a loss of them, are computed while the model's own forward
calls its head. At that moment the hidden states are those that enter the head, and the head's
weight is whole, however wrappers shard it.

`model_token_stats` and the losses of models (`model_losses.py`, `model_preference.py`,
`model_policy.py`, `model_divergence.py`) say what the work is. `model_inputs.py` and `packing.py`
check the inputs of the forward. `stand_in.py` takes the place of the head. `head_scorer.py` makes a
`Scorer` of the hidden states and the head, with which the work is done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrlhf.ops import shift_targets
from fastrlhf.ops.backend import is_batched
from fastrlhf.ops.layout import layout_of
from fastrlhf.ops.ranks import gathered
from fastrlhf.ops.scorer import LinearScorer, Scorer
from fastrlhf.ops.transform import temperatures_of_layout, token_temperatures

from .causality import check_causal
from .head_check import check_weight
from .head_parts import (
    HeadParts,
    base_model,
    check_weights,
    gathers_its_parts,
    head_module,
    parts_within_call,
    virtual_tokens,
    without_virtual_tokens,
)
from .head_scorer import head_scorer
from .logit_map import LogitMap
from .measured import measured, state_of
from .model_inputs import (
    TokenBatch,
    check_ids,
    check_keywords,
    check_model,
    given_inputs,
    scored_tokens,
    support_of_positions,
    with_positions,
    with_rows_of_positions,
)
from .packing import check_restarts, packed_inputs
from .stand_in import StandIn, logits_of

IGNORED = -100  # the target of a token that is not scored
_COMPARED_TOKENS = 4


# A function that is given a scorer of the model's tokens, and their targets (B, T), aligned with
# the positions that predict them. It returns a tensor that is tied to the model's graph, and
# anything else.
Work = Callable[[Scorer, Tensor], tuple[Tensor, Any]]


class Done(NamedTuple):
    """The results of the work at the head, and of the model's forward."""

    result: Tensor  # the tensor of the work, tied to the model's output: see `stand_in`
    aside: Any  # the rest of what the work returned
    outputs: Any  # what the model's forward returned; from `at_head`, without logits

    def with_outputs(self, wanted: bool) -> tuple[Any, ...]:
        """Return what the work returned, followed by the model's outputs if they are wanted."""
        return (self.result, self.aside, self.outputs) if wanted else (self.result, self.aside)


def at_head(model: nn.Module, batch: TokenBatch, work: Work) -> Done:
    """Run a model's forward, with the work in place of its head.

    The model's output tells what the model does to its logits. If that differs from what was
    assumed (as at the first call of a model that scales or caps them), all is done once more.

    Raises:
        TypeError, ValueError, RuntimeError: as `model_token_stats`.
    """
    base = base_model(model)
    module, name = head_module(base), type(base).__name__
    ids, attention_mask = batch.input_ids, batch.attention_mask
    check_ids(ids)
    check_weights(module, name)
    check_model(base, name)
    check_keywords(base, batch.inputs, batch.options)
    batch = batch._replace(inputs=given_inputs(batch.inputs))
    check_causal(base)
    # Where position_ids start again, a new document starts. Not so in a tree of tokens, where
    # `rows` tell which position predicts each token.
    positions = batch.inputs.get("position_ids") if batch.rows is None else None
    scored = scored_tokens(ids, attention_mask, batch.mask, positions, batch.rows)
    if batch.rows is not None:
        batch = with_rows_of_positions(batch, scored)
    elif batch.cu_seqlens is None:
        check_restarts(model, base, batch)
    if batch.cu_seqlens is None:
        inputs = with_positions(base, attention_mask, batch.inputs, model)
    else:
        inputs = packed_inputs(model, base, batch)
    inputs = {"use_cache": False, **inputs}
    targets = shift_targets(ids, scored, cu_seqlens=batch.cu_seqlens, ignore_index=IGNORED)
    if batch.support is not None:
        support = support_of_positions(batch.support, targets, IGNORED)
        batch = batch._replace(support=support)
    batch = batch._replace(temperature=_of_positions(batch, targets))

    def forward(_: StandIn) -> tuple[Any, Tensor]:
        outputs = model(input_ids=ids, attention_mask=attention_mask, **inputs)
        return outputs, logits_of(outputs)

    done = in_place_of_head(model, targets, batch, work, forward)
    return done._replace(outputs=_without_logits(done.outputs))


def in_place_of_head(
    model: nn.Module,
    targets: Tensor,
    batch: TokenBatch,
    work: Work,
    forward: Callable[[StandIn], tuple[Any, Tensor]],
) -> Done:
    """Run a forward of a model with the work in place of the model's head. If the model does not do
    to its logits what was assumed, run it once more. `forward` returns anything, which becomes
    `outputs`, and what the model made of its logits.
    """
    base = base_model(model)
    module, name = head_module(base), type(base).__name__
    for _ in range(2):
        worker = _Worker(base, module, targets, batch, virtual_tokens(model), work)
        stand_in = StandIn(module, name, worker)
        with stand_in.in_place():
            outputs, logits = forward(stand_in)
        result = stand_in.result(logits)
        if not worker.measures or worker.confirmed(stand_in, logits):
            return Done(result, worker.aside, outputs)
        del worker, stand_in, outputs, logits, result  # frees their graphs before new ones are made
    raise RuntimeError(
        f"model: {name} does something else to its logits at each call; use token_stats on them"
    )


def _of_positions(batch: TokenBatch, targets: Tensor) -> float | Tensor:
    """Give each position (B, T) the temperature of the token that it predicts."""
    layout = layout_of("input_ids", targets, batch.cu_seqlens)
    temperature = temperatures_of_layout(batch.temperature, targets, layout)
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature is not batch.temperature:  # already spread over positions
        return temperature
    last = temperature.new_ones(())  # for the last position, which predicts no token
    expanded = token_temperatures(temperature, targets[:, 1:])
    return torch.cat((expanded, last.expand(len(expanded), 1)), dim=1)


def _on_device_of(hidden: Tensor, x: Any) -> Any:
    """Move a tensor, or a tuple of them, to the device of the hidden states."""
    if isinstance(x, tuple):
        return tuple(part.to(hidden.device) for part in x)
    return None if x is None else x.to(hidden.device)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return output[1:]
    return type(output)(**{key: value for key, value in output.items() if key != "logits"})


class _Worker:
    """A `StandIn` calls it with the hidden states that enter the head, to do the work on them."""

    def __init__(
        self, base: Any, module: Any, targets: Tensor, batch: TokenBatch, virtual: int, work: Work
    ):
        self.base, self.module, self.targets, self.batch = base, module, targets, batch
        self.virtual, self.work = virtual, work
        self.measures = False  # whether this call measures what the model does to its logits
        self.aside: Any = None
        self.map: LogitMap
        self.parts: HeadParts | None

    def __call__(self, hidden: Tensor, head_forward: Callable[..., Tensor]) -> tuple[Tensor, int]:
        hidden = without_virtual_tokens(hidden, self.targets.shape[1], self.virtual)
        if hidden.shape[:2] != self.targets.shape:
            raise ValueError(
                "input_ids: expected a hidden state for each of the tokens "
                f"{tuple(self.targets.shape)}, got {tuple(hidden.shape[:2])}: the model adds or "
                "leaves out positions"
            )
        targets = self.targets.to(hidden.device)
        self.parts = parts_within_call(self.module)
        due = self._begin_call(targets, hidden)
        scorer = self._scorer(hidden, head_forward)
        result, self.aside = self.work(scorer, targets)
        if self.measures and due and isinstance(scorer, LinearScorer):
            some = (targets.reshape(-1) != IGNORED).nonzero()[:_COMPARED_TOKENS, 0]
            assert self.parts is not None
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            check_weight(self.module, head_forward, self.parts, flat[some])
        return result, scorer.vocab

    def _begin_call(self, targets: Tensor, hidden: Tensor) -> bool:
        """Take the map that was measured before, and decide whether this call measures it again.
        Returns whether the head's output is to be compared with that of its weight, too.
        """
        known, parts = measured(self.base, self.module, self.parts), self.parts
        due, self.map = known.is_due(), known.map
        if parts is not None and parts.part is not None and hidden.device.type == "cpu":
            # All ranks compare if one does, since that takes collectives, and a hook may have
            # changed on that rank alone. On a GPU ranks are not asked: it would have to be awaited.
            due = bool(gathered(torch.tensor(due).int(), parts.part.group).any())
        known.calls += 1
        if not is_batched(targets, hidden):
            self.measures = due or hidden.device.type == "cpu"
        elif known.state is None:
            raise RuntimeError(
                "model: the first call for a head, which looks at its logits, does not work "
                "under torch.func.vmap; call model_token_stats once outside"
            )
        return due

    def _scorer(self, hidden: Tensor, head_forward: Callable[..., Tensor]) -> Scorer:
        batch, temperature = self.batch, self.batch.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(hidden.device)
        chunk_size = batch.chunk_size
        if gathers_its_parts(self.module):
            # All tokens in one chunk: all processes meet in each chunk, and a process with more
            # tokens would have more chunks, and wait for the others for ever.
            chunk_size = max(1, self.targets.numel())
        return head_scorer(
            hidden, head_forward, self.parts, self.map, temperature=temperature,
            chunk_size=chunk_size, impl=batch.impl, support=_on_device_of(hidden, batch.support),
            rows=_on_device_of(hidden, batch.rows),
        )  # fmt: skip

    def confirmed(self, stand_in: StandIn, logits: Tensor) -> bool:
        """Remember what the model does to its logits, and return whether it was as assumed."""
        known = measured(self.base, self.module, self.parts)
        part = None if self.parts is None else self.parts.part
        known.map = stand_in.check(logits, self.map, part)
        known.state = state_of(self.base, self.module, self.parts)
        return known.map is self.map
