"""A step of TRL's trainers, on TRL's kernels or on those of this library.

The batch is that of `model_step.py`, laid out as by each trainer's collator. The function
`trainer.training_step` is timed: forward, loss, metrics and backward. Everything before it, such as
GRPO's rollout, is left out, and so is the optimizer's step after it. All of it is in the dtype of
the model, without autocast and without gradient checkpointing.

- SFT: the mean negative log-prob of the completions.
- DPO: as by default, the reference runs in every step. It is another model if all parameters are
  trained; with LoRA it is the model without its adapters.
- GRPO: the step is the first update after a rollout, so the policy is the one that sampled.

The contestants:

- TRL: unchanged.
- TRL, prompts skipped: on a CPU, TRL also scores prompts and padding; on a GPU it does not. This
  contestant leaves them out on a CPU as well, which is the fair comparison.
- patched: within `fastrlhf.integrations.trl.patched()`.
- subclass: patched, and a DPO trainer whose loss is `fastrlhf.model_dpo_loss`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple
from unittest import mock

import losses
import torch
from model_step import Step, causal_lm_loss, clipped_loss, dpo_loss, logits_of, logprobs_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastrlhf
from fastrlhf.integrations import trl as integration

# If the reference is another model, its last norm is scaled by this, which sharpens its logits.
_SHARPER = 1.02

Inputs = dict[str, Any]


@dataclass(frozen=True)
class TrainerStep(Step):
    """A step that also runs a reference."""

    reference: nn.Module | None  # None: the model without its adapters

    def exact(self) -> TrainerStep:
        """Return a copy in fp64, including the reference."""
        reference = self.reference and copy.deepcopy(self.reference).double()
        return replace(super().exact(), reference=reference)

    @contextlib.contextmanager
    def asking_reference(self) -> Iterator[Step]:
        """Yield the step with the reference as its model, without gradients."""
        with torch.no_grad():
            if self.reference is not None:
                yield replace(self, model=self.reference)
            else:
                with self.model.disable_adapter():
                    yield self


def make_trainer_step(step: Step) -> TrainerStep:
    """Add the reference to a step."""
    reference = None
    if step.trained:
        reference = copy.deepcopy(step.model).requires_grad_(False).eval()
        with torch.no_grad():
            reference.model.norm.weight.mul_(_SHARPER)
    return TrainerStep(**{x.name: getattr(step, x.name) for x in fields(Step)}, reference=reference)


def with_prompts_on_the_left(step: TrainerStep) -> TrainerStep:
    """Return the same tokens padded as in GRPO: prompts on the left, completions on the right."""

    def parts(kept: Tensor, side: str) -> tuple[Tensor, Tensor]:
        rows = [ids[keep] for ids, keep in zip(step.ids, kept, strict=True)]
        pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
        return pad(rows), pad([torch.ones_like(row) for row in rows])

    prompts, prompt_mask = parts((step.attention != 0) & ~step.mask, "left")
    completions, completion_mask = parts(step.mask, "right")
    return replace(
        step,
        ids=torch.cat((prompts, completions), dim=1),
        attention=torch.cat((prompt_mask, completion_mask), dim=1),
        mask=torch.cat((torch.zeros_like(prompt_mask), completion_mask), dim=1).bool(),
    )


# The losses in plain PyTorch.


def _plain_sft(step: TrainerStep) -> Tensor:
    return causal_lm_loss(logits_of(step), step.labels)


def _plain_dpo(step: TrainerStep) -> Tensor:
    with step.asking_reference() as of_reference:
        ref_logps = logprobs_of(of_reference).sum(-1)
    return dpo_loss(logprobs_of(step), replace(step, ref_logps=ref_logps))


def _plain_grpo(step: TrainerStep) -> Tensor:
    logprobs = logprobs_of(step)
    return clipped_loss(logprobs, replace(step, old=logprobs.detach()))


def body(name: str, step: TrainerStep) -> None:
    """Run a step without its head: the hidden states and their backward.

    For DPO the hidden states of the reference are included.
    """
    if name == "DPO":
        with step.asking_reference() as of_reference:
            _hidden(of_reference)
    _hidden(step).sum().backward()


def _hidden(step: Step) -> Tensor:
    body = step.base.model
    return body(step.ids, step.attention, use_cache=False).last_hidden_state


# The inputs of the trainers.


def _sft_inputs(step: Step) -> Inputs:
    return {"input_ids": step.ids, "attention_mask": step.attention, "labels": step.labels}


def _dpo_inputs(step: Step) -> Inputs:
    mask = step.mask.long()
    return {"input_ids": step.ids, "attention_mask": step.attention, "completion_mask": mask}


def _grpo_inputs(step: Step) -> Inputs:
    prompt = int(step.mask.any(0).nonzero()[0])
    return {
        "prompt_ids": step.ids[:, :prompt], "prompt_mask": step.attention[:, :prompt],
        "completion_ids": step.ids[:, prompt:], "completion_mask": step.attention[:, prompt:],
        "advantages": step.advantages, "num_items_in_batch": step.mask.sum(),
    }  # fmt: skip


class Kind(NamedTuple):
    """A kind of trainer, with its formula, inputs and options."""

    plain: Callable[[TrainerStep], Tensor]  # the formula that the check evaluates in fp64
    inputs: Callable[[Step], Inputs]
    example: dict[str, str]  # a row of the data set, which it demands at its creation
    options: dict[str, Any]  # options of its config


KINDS = {
    "SFT": Kind(_plain_sft, _sft_inputs, {"prompt": "a", "completion": " b"}, {}),
    "DPO": Kind(
        _plain_dpo, _dpo_inputs, {"prompt": "a", "chosen": " b", "rejected": " a"},
        {"beta": losses.BETA},
    ),
    "GRPO": Kind(
        _plain_grpo, _grpo_inputs, {"prompt": "a"},
        {"num_generations": 2, "epsilon": losses.CLIP, "loss_type": "dapo", "beta": 0.0},
    ),
}  # fmt: skip


@functools.cache
def fused_dpo_trainer() -> type:
    """Return a DPO trainer whose loss is one call, which never computes the logits twice."""
    from trl import DPOTrainer

    class FusedDPOTrainer(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, mask = inputs["input_ids"], inputs["completion_mask"]
            ref = torch.cat(self.compute_ref_log_probs(self.ref_model or model, inputs))
            chosen, rejected = torch.arange(len(ids), device=ids.device).chunk(2)
            losses, _ = fastrlhf.model_dpo_loss(
                model, ids, inputs["attention_mask"], ref, chosen, rejected, self.beta, mask=mask
            )
            return losses.mean()

    return FusedDPOTrainer


def trainer_class(name: str) -> type:
    """Return TRL's own trainer of a name."""
    import trl

    return getattr(trl, f"{name}Trainer")


@contextlib.contextmanager
def _prompts_skipped() -> Iterator[None]:
    from trl.trainer import utils

    with mock.patch.object(utils, "_use_triton", lambda device: True):
        yield


class Contestant(NamedTuple):
    """A trainer, and the context in which it is created and run."""

    load: Callable[[], type]
    around: Callable[[], AbstractContextManager[None]]


def contestants(name: str, device: torch.device) -> dict[str, Contestant]:
    """Return the contestants by name."""
    of_trl = functools.partial(trainer_class, name)
    found = {"TRL": Contestant(of_trl, contextlib.nullcontext)}
    if device.type == "cpu":
        found["TRL, prompts skipped"] = Contestant(of_trl, _prompts_skipped)
    found["patched"] = Contestant(of_trl, integration.patched)
    if name == "DPO":
        found["subclass"] = Contestant(fused_dpo_trainer, integration.patched)
    return found


def make_work(name: str, load: Callable[[], type], step: TrainerStep) -> Callable[[], Tensor]:
    """Return a step of a trainer: it returns the loss and leaves gradients in the parameters."""
    trainer = _make_trainer(name, load(), step)
    inputs = KINDS[name].inputs(step)
    count = step.mask.sum() if name == "SFT" else None  # transformers counts tokens with a label
    if name == "GRPO":  # GRPO would otherwise generate completions here
        trainer._prepare_inputs = lambda inputs: inputs
    trainer.current_gradient_accumulation_steps = 1
    return lambda: trainer.training_step(trainer.model, dict(inputs), count)


def _make_trainer(name: str, make: type, step: TrainerStep) -> Any:
    import datasets
    import trl

    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{name}Config")(
            folder, report_to="none", use_cpu=step.ids.device.type == "cpu", bf16=False,
            gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=2,
            **kind.options,
        )  # fmt: skip
        options: dict[str, Any] = {}
        if name == "DPO" and step.reference is not None:
            options["ref_model"] = _sharing(step.reference)
        if name == "GRPO":
            options["reward_funcs"] = _no_reward
        datasets.disable_progress_bars()
        trainer = make(
            model=_sharing(step.model), args=args, processing_class=_tokenizer(),
            train_dataset=datasets.Dataset.from_list([kind.example] * 2), **options,
        )  # fmt: skip
    if name == "DPO" and step.reference is None:
        # The trainer copies the adapters of such a model for its reference, which is not wanted.
        trainer.model.delete_adapter("ref")
    return trainer


def _sharing(model: nn.Module) -> nn.Module:
    """Return a copy that shares its parameters, whose forward a trainer may replace."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _no_reward(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _tokenizer() -> Any:
    """Return a small tokenizer. A trainer demands one, but does not use it on given batches."""
    import tokenizers
    import transformers

    words = {"<end>": 0, "a": 1, "b": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )
