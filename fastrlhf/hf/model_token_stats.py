"""Statistics of a model's tokens, taken where the model would make its logits (see `stand_in`)."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastrlhf.ops import shift_targets
from fastrlhf.ops.backend import is_batched
from fastrlhf.ops.linear_arguments import checked_problem
from fastrlhf.ops.linear_head import Head, QuantizedWeight, Weight
from fastrlhf.ops.linear_token_stats import token_stats_of
from fastrlhf.ops.transform import token_temperatures
from fastrlhf.reference import TokenStats

from .causality import check_causal
from .head_parts import (
    HeadParts,
    base_model,
    check_weights,
    evaluating,
    head_module,
    head_parts,
    virtual_tokens,
    without_virtual_tokens,
)
from .logit_map import LogitMap
from .measured import measured, state_of
from .model_inputs import check_ids, check_keywords, check_model, scored_tokens, with_positions
from .own_module import stats_of_module
from .stand_in import StandIn

_IGNORED = -100
_COMPARED_TOKENS = 4


@overload
def model_token_stats(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_outputs: Literal[True],
    **options: Any,
) -> tuple[TokenStats, Any]: ...


@overload
def model_token_stats(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_outputs: Literal[False] = False,
    **options: Any,
) -> TokenStats: ...


def model_token_stats(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
    return_outputs: bool = False,
    **inputs: Any,
) -> TokenStats | tuple[TokenStats, Any]:
    """Run a causal language model and compute `token_stats` of its tokens, without the logits.

    Eager equivalent::

        logits = model(input_ids, attention_mask=attention_mask, **inputs).logits[:, :-1]
        token_stats(logits, input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100), ...)

    Args:
        model: any AutoModelForCausalLM; wrapped by peft, DistributedDataParallel or FSDP or not.
        input_ids: (B, T) integer.
        attention_mask: as the model takes it; (B, T) 0/1, as a rule.
        mask: (B, T) bool or 0/1, the tokens to score; the others cost nothing at the head. None:
            those that attention_mask (B, T) has, and that follow one that it has.
        temperature: positive number, or a tensor of one for each sequence, (B,), or a 2-d one that
            broadcasts to (B, T-1).
        entropy, chunk_size, impl: as `linear_token_stats`.
        return_outputs: return (stats, outputs), the outputs of the model without its logits: the
            auxiliary loss of a mixture of experts, hidden states for a value head.
        inputs: what else the model's forward names (position_ids, pixel_values, ...), but labels.
            `use_cache` is False unless given. Where attention_mask starts with zeros and no
            position_ids are given, they count the tokens that it has, so that a sequence has the
            log-probs that it has without padding. Where given ones start again, a document does,
            whose first token is not scored.

    Returns:
        TokenStats of shape (B, T-1), aligned with input_ids[:, 1:]; 0 for tokens that are not
        scored.

    Differentiable with respect to all parameters. The plan, and with it the cost, is that of
    `linear_token_stats`: two vocabulary matmuls where the head is frozen (LoRA), four where it is
    trained. The factors of a LoRA adapter on the head are multiplied one after the other, so its
    matrix is never built; other adapters of peft on the head (DoRA, IA3, OFT, VeRA, trained tokens)
    run through their own module, a chunk of tokens at a time, again in backward. A quantized head
    (bitsandbytes) is dequantized in slices; an 8-bit one gives the logits of its weights, without
    the rounding of hidden states to 8 bits that the module's own forward does.

    What the model does to the logits of its head is measured on three rows of numbers that pass
    through its forward: at every call on a CPU; on a GPU, where that waits for the device, whenever
    hooks, forwards, adapters or config have changed, and every 64th call. The head itself is then
    compared on four tokens. A forward that shows another scale, softcap or offset than the one
    before is run once more, with it. The first call for a head has to come outside of
    torch.func.vmap; apart from that, `torch.func` works as in `linear_token_stats`. Not for use
    from several threads on one model.

    Raises:
        ValueError: inputs that do not fit, labels, a model that changes the number of positions.
        TypeError: a head of a class that is not known, an encoder or an encoder-decoder, a keyword
            that the model's forward does not name.
        RuntimeError: logits that are not those of the head's weight, or are changed in a way that
            is no scale, softcap or offset; a forward that does not call the head once.
    """
    base = base_model(model)
    module, name = head_module(base), type(base).__name__
    check_ids(input_ids)
    check_weights(module, name)
    check_model(base, name)
    check_keywords(base, inputs)
    check_causal(base)
    scored = scored_tokens(input_ids, attention_mask, mask, inputs.get("position_ids"))
    targets = shift_targets(input_ids, scored, ignore_index=_IGNORED)
    if isinstance(temperature, Tensor):
        last = temperature.new_ones(())  # of the position that predicts nothing
        expanded = token_temperatures(temperature, targets[:, 1:])
        temperature = torch.cat((expanded, last.expand(len(expanded), 1)), dim=1)
    options = {
        "temperature": temperature, "entropy": entropy, "chunk_size": chunk_size, "impl": impl,
        "ignore_index": _IGNORED,
    }  # fmt: skip
    inputs = {"use_cache": False, **with_positions(base, attention_mask, inputs, model)}
    virtual = virtual_tokens(model)
    for _ in range(2):
        scorer = _Scorer(base, module, targets, options, virtual)
        stand_in = StandIn(module, name, scorer)
        with stand_in.in_place():
            output = model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        carrier = stand_in.result(output)
        if not scorer.looks or scorer.confirmed(stand_in, output):
            break
    else:
        raise RuntimeError(
            f"model: {name} does something else to its logits at each call; use token_stats on them"
        )
    logprob, *rest = carrier[:, :-1].unbind(-1)
    stats = TokenStats(logprob, rest[0] if entropy else None, scorer.lse[:, :-1])
    return (stats, _without_logits(output)) if return_outputs else stats


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return output[1:]
    return type(output)(**{key: value for key, value in output.items() if key != "logits"})


class _Scorer:
    """Scores the tokens of hidden states in place of the head."""

    def __init__(
        self, base: Any, module: Any, targets: Tensor, options: dict[str, Any], virtual: int
    ):
        self.base, self.module, self.targets, self.options = base, module, targets, options
        self.virtual = virtual
        self.looks = False
        self.lse: Tensor
        self.map: LogitMap
        self.parts: HeadParts | None

    def __call__(self, hidden: Tensor, own: Callable[..., Tensor]) -> tuple[Tensor, int]:
        hidden = without_virtual_tokens(hidden, self.targets.shape[1], self.virtual)
        if hidden.shape[:2] != self.targets.shape:
            raise ValueError(
                "input_ids: expected a hidden state for each of the tokens "
                f"{tuple(self.targets.shape)}, got {tuple(hidden.shape[:2])}: the model adds or "
                "leaves out positions"
            )
        targets, options = self.targets.to(hidden.device), dict(self.options)
        if isinstance(options["temperature"], Tensor):
            options["temperature"] = options["temperature"].to(hidden.device)
        self.parts = parts = head_parts(self.module)
        known = measured(self.base, self.module, parts)
        due, self.map = known.is_due(), known.map
        known.calls += 1
        if is_batched(targets, hidden):
            if known.state is None:
                raise RuntimeError(
                    "model: the first call for a head, which looks at its logits, does not work "
                    "under torch.func.vmap; call model_token_stats once outside"
                )
        else:
            self.looks = due or hidden.device.type == "cpu"
        plain = self.map.softcap is None or self.map.offset is None
        if parts is None or not plain:
            stats, vocab = stats_of_module(own, self.map, hidden, targets, options)
        else:
            wide, weights = _with_adapters(parts, hidden)
            problem = checked_problem(
                wide, weights, targets, bias=self.map.folded_bias(parts.bias),
                scale=self.map.scale, softcap=self.map.softcap, **options,
            )  # fmt: skip
            stats, vocab = token_stats_of(problem), weights[0].shape[0]
            if self.looks and due:
                some = (targets.reshape(-1) != _IGNORED).nonzero()[:_COMPARED_TOKENS, 0]
                head = Head(weights, parts.bias, problem.options.dtype)
                self._compare(own, head, hidden.reshape(-1, hidden.shape[-1])[some])
        self.lse = stats.lse
        kept = [x for x in (stats.logprob, stats.entropy) if x is not None]
        return torch.stack(kept, dim=-1), vocab

    @torch.no_grad()
    def _compare(self, own: Callable[..., Tensor], head: Head, hidden: Tensor) -> None:
        """Raise RuntimeError unless the head's own forward multiplies by its weight."""
        if not hidden.shape[0]:
            return
        assert self.parts is not None
        with evaluating(self.module):  # the dropout of adapters would differ each time
            logits = own(hidden.unsqueeze(0))[0]
            wide = _with_adapters(self.parts, hidden)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            expected = head.logits(wide.to(head.dtype).to(head.operands))
        weight = self.parts.weight
        eight_bit = isinstance(weight, QuantizedWeight) and weight.table is None
        half = logits.dtype in (torch.bfloat16, torch.float16)
        # Of the largest logit of a row. The module of an 8-bit head rounds its hidden states.
        tolerance = 0.1 if eight_bit else 2**-5 if half else 1e-3
        error = (logits.to(expected) - expected).abs().amax(-1)
        if not bool((error <= tolerance * expected.abs().amax(-1)).all()):
            raise RuntimeError(
                f"model: the forward of its head, a {type(self.module).__name__}, gives other "
                "logits than its weight, so log-probs would be wrong; use token_stats on the "
                "model's logits"
            )

    def confirmed(self, stand_in: StandIn, output: Any) -> bool:
        """Whether the model does to its logits what was assumed. Remember what it does."""
        known = measured(self.base, self.module, self.parts)
        known.map = stand_in.check(output, self.map)
        known.state = state_of(self.base, self.module, self.parts)
        return known.map is self.map


def _with_adapters(parts: HeadParts, hidden: Tensor) -> tuple[Tensor, list[Weight]]:
    """Widen hidden states by what the adapters make of them, and the weight by their blocks."""
    blocks, weights = [hidden], [parts.weight]
    for adapter in parts.adapters:
        dtype = adapter.down.weight.dtype
        low = adapter.down(adapter.dropout(hidden.to(dtype))) * adapter.scaling
        blocks.append(low.to(hidden.dtype))
        weights.append(adapter.up.weight.to(hidden.dtype))
    return torch.cat(blocks, dim=-1) if parts.adapters else hidden, weights
