"""Statistics of a model's tokens, taken where the model would make its logits.

The model's own forward runs, wrappers, hooks and all, but for the time of the call its head does
something else: it computes the statistics and passes on a placeholder of one number a token. So
the weight is read while it is whole (FSDP and ZeRO-3 gather it for the head's call), and the graph
runs through the head as wrappers expect.

What the model does to its logits after the head cannot be seen from there. It is known from the
config, and on first use put to the test: the placeholder then is a few tokens' own logits and a row
of numbers from -100 to 100, and what the model makes of them must be what is expected.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastrlhf.ops import shift_targets
from fastrlhf.ops.backend import is_batched
from fastrlhf.ops.checks import check_integer, check_mask, check_shape
from fastrlhf.ops.linear_arguments import checked_problem
from fastrlhf.ops.linear_head import Head, QuantizedWeight, Weight
from fastrlhf.ops.linear_token_stats import token_stats_of
from fastrlhf.ops.transform import token_temperatures
from fastrlhf.reference import TokenStats, capped_logits

from .lm_head import HeadParts, base_model, head_module, head_parts, logit_transform

_IGNORED = -100
_CHECKED_TOKENS = 4

# For each head, how it was when its logits were last checked.
_checked: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


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
    **inputs: Any,
) -> TokenStats:
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
        inputs: what else the model takes (position_ids, pixel_values, ...), but labels.
            `use_cache` is False unless given.

    Returns:
        TokenStats of shape (B, T-1), aligned with input_ids[:, 1:]; 0 for tokens that are not
        scored.

    Differentiable with respect to all parameters. The plan, and with it the cost, is that of
    `linear_token_stats`: two vocabulary matmuls where the head is frozen (LoRA), four where it is
    trained. The factors of a LoRA adapter on the head are multiplied one after the other, so its
    matrix is never built. A quantized head (bitsandbytes) is dequantized in slices; an 8-bit one
    gives the logits of its weights, without the rounding of hidden states to 8 bits that the
    module's own forward does.

    The first call for a head compares a few tokens with the model's own logits, and so has to come
    outside of torch.func.vmap; apart from that, `torch.func` works as in `linear_token_stats`. Not
    for use from several threads on one model.

    Raises:
        ValueError: inputs that do not fit, labels, a model that changes the number of positions.
        TypeError: a head of a class that is not known.
        RuntimeError: logits other than what the config says, or a forward that does not call the
            head once.
    """
    if "labels" in inputs:
        raise ValueError("labels: expected none, since there are no logits to take a loss of")
    scored = _scored_tokens(input_ids, attention_mask, mask)
    targets = shift_targets(input_ids, scored, ignore_index=_IGNORED)
    base = base_model(model)
    module = head_module(base)
    if isinstance(temperature, Tensor):
        last = temperature.new_ones(())  # of the position that predicts nothing
        expanded = token_temperatures(temperature, targets[:, 1:])
        temperature = torch.cat((expanded, last.expand(len(expanded), 1)), dim=1)
    options = {
        "temperature": temperature, "entropy": entropy, "chunk_size": chunk_size, "impl": impl,
        "ignore_index": _IGNORED,
    }  # fmt: skip
    scorer = _Scorer(module, targets, logit_transform(base), options)
    inputs.setdefault("use_cache", False)
    with scorer.in_place_of_the_head():
        output = model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    return scorer.result(output, type(base).__name__)


def _scored_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Check the inputs, and decide which tokens are scored."""
    check_integer("input_ids", input_ids)
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected shape (B, T), T > 0, got {tuple(input_ids.shape)}")
    if mask is not None:
        check_mask("mask", mask)
        check_shape("mask", mask, tuple(input_ids.shape), "the shape of input_ids")
        return mask
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            "attention_mask: expected a tensor (or give `mask`, which says what to score), got "
            f"{type(attention_mask).__name__}"
        )
    if attention_mask.ndim != 2:
        return None
    check_mask("attention_mask", attention_mask)
    check_shape("attention_mask", attention_mask, tuple(input_ids.shape), "that of input_ids")
    attended = attention_mask != 0
    scored = attended.clone()
    # What predicts the first token after padding on the left is padding.
    scored[:, 1:] &= attended[:, :-1]
    return scored


class _Scorer:
    """Stands in for the head during one forward of its model."""

    def __init__(
        self,
        module: nn.Module,
        targets: Tensor,
        transform: tuple[float, float | None],
        options: dict[str, Any],
    ):
        self.module, self.targets, self.options = module, targets, options
        self.scale, self.softcap = transform
        self.stats: TokenStats | None = None
        self.expected: Tensor | None = None  # what the model should make of the placeholder
        self.tolerance = 0.0
        self.signature: tuple = ()

    @contextmanager
    def in_place_of_the_head(self) -> Iterator[None]:
        # accelerate puts a forward that moves weights around the module's own.
        name = "_old_forward" if hasattr(self.module, "_hf_hook") else "forward"
        own, attributes = getattr(self.module, name), vars(self.module)
        before = {name: attributes[name]} if name in attributes else {}
        self.own_forward: Callable[..., Tensor] = own
        attributes[name] = self
        try:
            yield
        finally:
            del attributes[name]
            attributes.update(before)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.stats is not None or args or kwargs:
            raise RuntimeError(
                "model: its forward calls its head twice or with further arguments, which fastrlhf "
                "does not know; use token_stats on the model's logits"
            )
        if hidden.shape[:2] != self.targets.shape:
            raise ValueError(
                "input_ids: expected a hidden state for each of the tokens "
                f"{tuple(self.targets.shape)}, got {tuple(hidden.shape[:2])}: the model adds or "
                "leaves out positions"
            )
        parts = head_parts(self.module)
        wide, weights = _with_adapters(parts, hidden)
        targets, options = self.targets.to(hidden.device), dict(self.options)
        if isinstance(options["temperature"], Tensor):
            options["temperature"] = options["temperature"].to(hidden.device)
        problem = checked_problem(
            wide, weights, targets, bias=parts.bias, scale=self.scale, softcap=self.softcap,
            **options,
        )  # fmt: skip
        self.stats = token_stats_of(problem)
        self.signature = _signature(self.module, parts, self.scale, self.softcap)
        if _checked.get(self.module) != self.signature:
            if is_batched(targets, hidden):
                raise RuntimeError(
                    "model: the first call for a head, which looks at its logits, does not work "
                    "under torch.func.vmap; call model_token_stats once outside"
                )
            some = (targets.reshape(-1) != _IGNORED).nonzero()[:_CHECKED_TOKENS, 0]
            if some.numel():
                head = Head(weights, parts.bias, problem.options.dtype)
                return self._probe(head, parts, hidden.reshape(-1, hidden.shape[-1])[some])
        return self.stats.logprob.unsqueeze(-1).to(hidden.dtype)

    def _probe(self, head: Head, parts: HeadParts, hidden: Tensor) -> Tensor:
        """Make a placeholder that tells how the model's logits come about: (1, tokens + 1, V)."""
        with _evaluating(self.module):  # the dropout of adapters would differ each time
            own = self.own_forward(hidden.unsqueeze(0))
            wide = _with_adapters(parts, hidden)[0]
        ramp = torch.linspace(-100, 100, own.shape[-1], device=own.device).to(own.dtype)
        with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
            wide = wide.to(head.dtype).to(head.operands)
            raw = torch.cat((head.logits(wide), ramp.to(head.sums).unsqueeze(0)))
            self.expected = capped_logits(raw, self.softcap, self.scale)
        eight_bit = isinstance(parts.weight, QuantizedWeight) and parts.weight.table is None
        half = own.dtype in (torch.bfloat16, torch.float16)
        # Of the largest logit of a row. The module of an 8-bit head rounds its hidden states.
        self.tolerance = 0.1 if eight_bit else 2**-5 if half else 1e-3
        return torch.cat((own, ramp.view(1, 1, -1)), dim=1)

    def result(self, output: Any, name: str) -> TokenStats:
        """Check what the model made of a probe, and align the statistics with the tokens."""
        if self.stats is None:
            raise RuntimeError(
                f"model: the forward of {name} does not call the module of its output embeddings; "
                "use token_stats on its logits"
            )
        if self.expected is not None:
            logits = (output[0] if isinstance(output, tuple) else output.logits).detach()[0]
            self._compare(logits, self.expected, name)
            _checked[self.module] = self.signature
        logprob, entropy, lse = self.stats
        entropy = None if entropy is None else entropy[:, :-1]
        return TokenStats(logprob[:, :-1], entropy, lse[:, :-1])

    def _compare(self, logits: Tensor, expected: Tensor, name: str) -> None:
        logits = logits.to(expected)
        if logits.shape == expected.shape:
            error = (logits - expected).abs().amax(-1) / expected.abs().amax(-1)
            if bool((error <= self.tolerance).all()):
                return
        raise RuntimeError(
            f"model: the logits of {name} are not what its config and its head say (scale "
            f"{self.scale}, softcap {self.softcap}), so its log-probs would be wrong; use "
            "token_stats on its logits"
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _with_adapters(parts: HeadParts, hidden: Tensor) -> tuple[Tensor, list[Weight]]:
    """Widen hidden states by what the adapters make of them, and the weight by their blocks."""
    blocks, weights = [hidden], [parts.weight]
    for adapter in parts.adapters:
        dtype = adapter.down.weight.dtype
        low = adapter.down(adapter.dropout(hidden.to(dtype))) * adapter.scaling
        blocks.append(low.to(hidden.dtype))
        weights.append(adapter.up.weight.to(hidden.dtype))
    return torch.cat(blocks, dim=-1) if parts.adapters else hidden, weights


def _signature(
    module: nn.Module, parts: HeadParts, scale: float, softcap: float | None
) -> tuple[Any, ...]:
    """What a check of a head is good for."""
    # A parameter, and what torch.func.functional_call puts in its place, are of one kind.
    weight = Tensor if isinstance(parts.weight, Tensor) else type(parts.weight)
    return type(module), weight, len(parts.adapters), scale, softcap
