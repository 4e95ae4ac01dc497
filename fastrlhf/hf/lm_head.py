"""The head of a causal language model, and the hidden states that enter it.

`head_parts.py` reads what the head's module holds, and `measured.py` what the model does to its
logits. The functions `model_*` do not come through here, but through `at_head.py`.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrlhf.ops.linear_head import Weight
from fastrlhf.ops.sharded import is_dtensor

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
from .model_inputs import check_keywords, given_inputs, with_positions
from .stand_in import StandIn, logits_of, own_forward

logger = logging.getLogger(__name__)


class LMHead(NamedTuple):
    """Logits are softcap·tanh(scale·(W·h + b) / softcap), or scale·(W·h + b) without a softcap.

    Of a tensor parallel head, weight and bias are DTensors, which the linear operations take.

    Source: as `lm_head`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> head = fastrlhf.lm_head(model)
        >>> head.options()
        {'bias': None, 'scale': 1.0, 'softcap': None}
    """

    weight: Weight  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def options(self, prefix: str = "") -> dict[str, Any]:
        """Keyword arguments of `linear_token_stats` and its relatives; with the prefix "ref_", of
        the reference's side of `linear_kl_divergence`.
        """
        named = {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}
        return {prefix + name: value for name, value in named.items()}


def lm_head(model: nn.Module) -> LMHead:
    """Find the weight, bias, scale and softcap with which a causal language model makes its logits.

    Eager equivalent: `linear_token_stats(hidden, head.weight, targets, **head.options())` is
    `token_stats(model(...).logits, targets)`, for the hidden states that enter the head.
    `head_inputs` gives those too, and is the better choice: what a backbone returns need not be
    what enters the head.

    Args:
        model: any AutoModelForCausalLM; wrapped by peft, DistributedDataParallel, DeepSpeed (ZeRO-1
            and 2) or torch.compile or not.

    Returns:
        LMHead with the model's own tensors. What the model does to its logits afterwards is not
        read from its config but measured, by a forward of two tokens, once for each state of the
        head: a scale, a softcap, and an offset of each word, which becomes part of the bias (-inf
        where a word is ruled out). The weight of a head that bitsandbytes quantized is a
        QuantizedWeight, which the operations dequantize in slices. A LoRA adapter on the head is
        added to it, W + scaling·B·A, in a matrix of its own and differentiably, but without the
        adapter's dropout; so is the matrix of other adapters, which their module is asked for.
        `model_token_stats` does neither build the matrix nor leave dropout out.

    Raises:
        TypeError: a head of a class that is not known; a layer between the backbone and the head,
            so that the backbone's hidden states are not those that enter the head.
        RuntimeError: a weight that is sharded, offloaded or empty outside of the model's forward
            (FSDP, ZeRO-3, accelerate's offloading): use `model_token_stats`; logits of which no
            scale, softcap and offset can be told.

    Source: a definition; the softcap is that of Gemma 2 (2408.00118, section 2).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> head = fastrlhf.lm_head(model)
        >>> head.weight.shape, head.bias, head.scale, head.softcap
        (torch.Size([9, 64]), None, 1.0, None)
    """
    base = base_model(model)
    module = head_module(base)
    check_weights(module, type(base).__name__)
    if not measured(base, module, head_parts(module)).follows_backbone:
        _compare_with_backbone(base)
    known = measured(base, module, head_parts(module))
    known.follows_backbone = True
    return _Capture(module, head_parts(module)).head(known.map)


def head_inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, LMHead]:
    """Run a language model up to its head, and return what enters the head, and the head.

    Eager equivalent: `linear_token_stats(hidden, head.weight, targets, **head.options())` is
    `token_stats(model(input_ids, attention_mask, **inputs).logits, targets)`.

    Args:
        model: as `lm_head`.
        input_ids, attention_mask: (B, T), as the model takes them.
        inputs: what else its forward takes, but labels: position_ids, or decoder_input_ids. Where
            sequences are padded on the left and no position_ids are given, they are made.

    Returns:
        hidden (B, T, H), with which the head is called by the model's own forward (without the
        virtual tokens of learned prompts), and LMHead, see `lm_head`. Both are differentiable. The
        model's output is measured each time.

    Raises:
        TypeError, ValueError, RuntimeError: as `lm_head` and `model_token_stats`.

    Source: as `lm_head`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> hidden, head = fastrlhf.head_inputs(model, ids)
        >>> targets = fastrlhf.shift_targets(ids)
        >>> stats = fastrlhf.linear_token_stats(hidden, head.weight, targets, **head.options())
        >>> hidden.shape, stats.logprob.shape
        (torch.Size([1, 5, 64]), torch.Size([1, 5]))
    """
    base = base_model(model)
    check_keywords(base, inputs)
    inputs = given_inputs(inputs)
    module = head_module(base)
    check_weights(module, type(base).__name__)
    capture = _Capture(module, head_parts(module))
    stand_in = StandIn(module, type(base).__name__, capture)
    inputs = {"use_cache": False, **with_positions(base, attention_mask, inputs, model)}
    with stand_in.in_place():
        output = model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    head_parts(module)  # raises where a weight that was whole before the forward is not any more
    hidden = stand_in.result(logits_of(output))
    hidden = without_virtual_tokens(hidden, input_ids.shape[1], virtual_tokens(model))
    known = measured(base, module, capture.parts)
    part = None if capture.parts is None else capture.parts.part
    known.map = stand_in.check(logits_of(output), known.map, part)
    known.state = state_of(base, module, capture.parts)
    return hidden, capture.head(known.map)


class _Capture:
    """Does nothing in place of a head but to look at it."""

    def __init__(self, module: Any, parts: HeadParts | None):
        self.module, self.parts = module, parts
        self.weight: Weight
        self.bias: Tensor | None
        if parts is not None and parts.part is not None:
            if parts.adapters:
                raise TypeError(
                    "model: an adapter around a head that is tensor parallel, which no one matrix "
                    "holds; use model_token_stats"
                )
            self.weight, self.bias = module.weight, module.bias  # DTensors, which tell the part
        elif parts is not None:
            self.weight, self.bias = parts.weight, parts.bias
            for adapter in parts.adapters:
                dense = self.weight[0 : self.weight.shape[0]]
                update = adapter.up.weight @ adapter.down.weight * adapter.scaling
                self.weight = dense + update.to(dense.dtype)
        else:
            # What the module makes of each unit vector, less what it makes of zeros.
            stored = module
            while not hasattr(stored, "in_features"):
                stored = getattr(stored, "original_module", None) or stored.get_base_layer()
            unit = torch.eye(
                stored.in_features, dtype=next(module.parameters()).dtype,
                device=next(module.parameters()).device,
            )  # fmt: skip
            # The forward without hooks: what they do to the logits is measured, as all that the
            # model does to them.
            with evaluating(module):
                forward = own_forward(module)
                self.bias = forward(torch.zeros_like(unit[:1]))[0]
                self.weight = (forward(unit) - self.bias).T

    def __call__(self, hidden: Tensor, own_forward: Any) -> tuple[Tensor, int]:
        return hidden, self.weight.shape[0]

    def head(self, logit_map: LogitMap) -> LMHead:
        if logit_map.softcap is not None and logit_map.offset is not None:
            raise TypeError(
                "model: its logits are capped and then added to, which the linear operations do "
                "not know; use model_token_stats"
            )
        if logit_map.offset is not None and is_dtensor(self.weight):
            raise TypeError(
                "model: its head is tensor parallel and its logits are added to, which the linear "
                "operations do not know together; use model_token_stats"
            )
        return LMHead(
            self.weight, logit_map.folded_bias(self.bias), logit_map.scale, logit_map.softcap
        )


@torch.no_grad()
def _compare_with_backbone(base: Any) -> None:
    """Measure a head on two tokens, and compare what enters it with what the backbone returns.

    Raises:
        TypeError: where that is something else.
    """
    embeddings = base.get_input_embeddings().weight
    device = "cpu" if embeddings.is_meta else embeddings.device  # offloaded by accelerate
    words = embeddings.shape[0] or 3  # 0 rows where ZeRO-3 gathers them for their call alone
    ids = torch.arange(1, 3, device=device).remainder(words).view(1, 2)
    inputs = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    returned: list[Tensor] = []

    def keep(_, args: Any, output: Any) -> None:
        last = output[0] if isinstance(output, tuple) else output.get("last_hidden_state")
        returned.append(last.full_tensor() if is_dtensor(last) else last)

    backbone = base.base_model
    hook = backbone.register_forward_hook(keep) if backbone is not base else None
    try:
        with evaluating(base):
            entered, _ = head_inputs(base, ids, torch.ones_like(ids), **inputs)
    finally:
        if hook is not None:
            hook.remove()
    if returned:
        _check_backbone(returned[-1], entered, type(base).__name__)


def _check_backbone(returned: Tensor | None, entered: Tensor, name: str) -> None:
    """Compare what a backbone returned with what entered the head."""
    if returned is not None and returned.shape == entered.shape:
        a, b = returned.double(), entered.double()
        factor = float((a * b).sum() / (a * a).sum())
        rounding = 1e-2 if returned.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if (b - factor * a).norm() <= rounding * b.norm():
            if abs(factor - 1) > rounding:
                logger.warning(
                    "%s multiplies the hidden states of its backbone by %.6g before they enter its "
                    "head; take them from fastrlhf.head_inputs",
                    name, factor,
                )  # fmt: skip
            return
    raise TypeError(
        f"model: in {name} a layer stands between the backbone and the head, so that the "
        "backbone's hidden states would give wrong log-probs; use head_inputs, which returns what "
        "enters the head, or model_token_stats"
    )
