"""Statistics of a model's tokens, taken where the model would make its logits (see `at_head`)."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastrlhf.ops.checks import check_bool, check_names
from fastrlhf.ops.kept_ids import Support
from fastrlhf.ops.scorer import Scorer
from fastrlhf.reference import FURTHER_STATS, TokenStats, stats_tuple

from .at_head import IGNORED, at_head
from .model_inputs import TokenBatch


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
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
    support: Support | None = None,
    rows: Tensor | None = None,
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
        model: any AutoModelForCausalLM; wrapped by peft, DistributedDataParallel, FSDP or DeepSpeed
            or not.
        input_ids: (B, T) integer.
        attention_mask: as the model takes it; (B, T) 0/1, as a rule.
        mask: (B, T) bool or 0/1, the tokens to score; the others cost nothing at the head. None:
            those that attention_mask (B, T) has, and that follow one that it has.
        cu_seqlens: (B + 1,) int32 or int64 borders of packed sequences, 0 first and N last, where
            input_ids (1, N) hold one sequence after the other. The first token of each is not
            scored. position_ids, unless given, start again with each sequence, by which a model of
            transformers keeps them apart if attention_mask is None; whether it does is tried once.
            A 4-d attention_mask is taken at its word.
        temperature: positive number, or a tensor of one for each sequence, (B,), or a 2-d one that
            broadcasts to (B, T-1).
        entropy, entropy_grad, with_stats, chunk_size, impl: as `linear_token_stats`.
        support: as `token_stats`, of the tokens input_ids[:, 1:], flattened: B·(T-1) + 1 offsets.
        rows: (B, T-1) integer, for the tokens input_ids[:, 1:] of a tree: the position in [0, T) of
            the same row of input_ids that predicts each, its parent, which comes before it. Several
            may have one parent, whose logits are made once. None: the position before. What each
            token sees is up to position_ids and an attention_mask (B, 1, T, T), of the model's
            dtype, 0 where a token sees another and the smallest number elsewhere; that they are
            those of the tree is not checked. Where position_ids start again is then no matter.
            Unless mask says so, all tokens after the first are scored, or, with attention_mask (B,
            T), those that it has and whose parents it has. A token counts once, whatever number of
            branches goes through it.
        return_outputs: return (stats, outputs), the outputs of the model without its logits: the
            auxiliary loss of a mixture of experts, hidden states for a value head.
        inputs: what else the model's forward names (position_ids, pixel_values, ...), but labels.
            `use_cache` is False unless given. Where attention_mask starts with zeros and no
            position_ids are given, they count the tokens that it has, so that a sequence has the
            log-probs that it has without padding. Where given ones start again, a document does,
            whose first token is not scored.

    Returns:
        TokenStats of shape (B, T-1), aligned with input_ids[:, 1:]; 0, or False, for tokens that
        are not scored.

    Differentiable with respect to all parameters. The plan, and with it the cost, is that of
    `linear_token_stats`: two vocabulary matmuls where the head is frozen (LoRA), four where it is
    trained; three, and those of the small factors, where only a LoRA adapter of it is. The factors
    of such an adapter are multiplied one after the other, so its matrix is never built; other
    adapters of peft on the head (DoRA, IA3, OFT, VeRA, trained tokens) run through their own
    module, a chunk of tokens at a time, again in backward. So do all adapters under ZeRO-3 or
    sharded by themselves, but in one chunk: processes would make unequal numbers of calls, and
    wait for each other. A quantized head (bitsandbytes) is dequantized in slices; an 8-bit one
    gives the logits of its weights, without the rounding of hidden states to 8 bits that the
    module's own forward does.

    Where tensor parallelism cuts the head along the vocabulary (torch's `ColwiseParallel`, or the
    plan of a model of transformers), each rank computes with its rows, and all call this with the
    same tokens: see `token_stats` for what is sent. Hooks and adapters are then the same on all
    ranks, and an adapter of the head is a LoRA one without dropout.

    What the model does to the logits of its head is measured on three rows of numbers that pass
    through its forward: at every call on a CPU; on a GPU, where that waits for the device, whenever
    hooks, forwards, adapters or config have changed, and every 64th call. The head itself is then
    compared on four tokens. A forward that shows another scale, softcap or offset than the one
    before is run once more, with it (and with other random numbers, where there is dropout). The
    first call for a head has to come outside of torch.func.vmap; apart from that, `torch.func`
    works as in `linear_token_stats`. Not for use from several threads on one model.

    Raises:
        ValueError: inputs that do not fit, labels, a model that changes the number of positions.
        TypeError: a head of a class that is not known, an encoder or an encoder-decoder, a keyword
            that the model's forward does not name; with cu_seqlens, a model in which sequences see
            each other.
        RuntimeError: logits that are not those of the head's weight, or are changed in a way that
            is no scale, softcap or offset; a forward that does not call the head once.

    Source: as `token_stats`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids = torch.tensor([[3, 1, 4, 1, 5], [8, 2, 6, 0, 0]])
        >>> attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        >>> stats = fastrlhf.model_token_stats(model, ids, attention_mask, entropy=True)
        >>> stats.logprob.shape, stats.logprob[1, 2:].tolist()
        (torch.Size([2, 4]), [0.0, 0.0])
    """
    batch = TokenBatch(
        input_ids, attention_mask, inputs, mask, cu_seqlens, temperature, chunk_size, impl,
        support, rows,
    )  # fmt: skip
    check_bool("entropy_grad", entropy_grad)
    with_stats = check_names("with_stats", with_stats, FURTHER_STATS)
    names = ("logprob", "entropy") if entropy and entropy_grad else ("logprob",)
    scored = partial(
        _statistics, names=names, entropy=entropy, entropy_grad=entropy_grad, with_stats=with_stats
    )
    done = at_head(model, batch, scored)
    values = dict(zip(names, done.result[:, :-1].unbind(-1), strict=True))
    values |= {name: x[:, :-1] for name, x in done.aside.items() if x is not None}
    further = {name: values[name] for name in with_stats}
    stats = stats_tuple(values["logprob"], values.get("entropy"), values["lse"], further)
    return (stats, done.outputs) if return_outputs else stats


def _statistics(
    scorer: Scorer, targets: Tensor, *, names: tuple[str, ...], **options: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the statistics of these names, which have a gradient, in one tensor (B, T, 1 or 2),
    and the others by name.
    """
    by_name = scorer.stats(targets, ignore_index=IGNORED, **options)._asdict()
    return torch.stack([by_name.pop(name) for name in names], dim=-1), by_name
