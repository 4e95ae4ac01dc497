"""Losses inside a model's forward against the same losses of its logits, in models that two
processes share.

Each process has batches of its own. What is wanted are the gradients of the mean over both, of a
model that nothing wraps.
"""

import json
import os
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastrlhf
from fastrlhf.hf.own_loss import with_fused_loss

from .matmuls import MatmulAudit

VOCAB, SEQUENCES, TOKENS = 101, 4, 9
TOLERANCE = 1e-5
CHOSEN, REJECTED = torch.tensor([0, 3]), torch.tensor([2, 1])
PAIR_WEIGHTS = torch.tensor([1.0, -0.5])


def small_model(kind: str = "plain", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny random model, the same in each process, in training mode."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    torch.manual_seed(7 if kind == "teacher" else 0)
    if kind == "teacher":
        sizes["hidden_size"] = 24
    name = "Llama"
    if kind == "scaled":  # the first forward, which does not know of the scale, is run once more
        name, sizes["logits_scaling"] = "Granite", 0.5
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    adapters = {
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "lora head": {"target_modules": ["q_proj", "lm_head"]},
        "dora head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    if kind in adapters:
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of renamed properties
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, **adapters[kind]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.train()


class Batch(NamedTuple):
    """What losses of 4 sequences take; what is of tokens is of input_ids[:, 1:]."""

    ids: Tensor
    attention: Tensor
    mask: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    weights: Tensor


def make_batch(seed: int, *, nothing: bool = False, tokens: int = TOKENS) -> Batch:
    """A batch, or one of which no token is scored."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    attention = torch.ones(SEQUENCES, tokens, dtype=torch.long)
    attention[1, tokens - 2 :] = 0
    mask = (attention != 0) & (torch.arange(tokens) >= 3) & (not nothing)
    shape = SEQUENCES, tokens - 1
    return Batch(
        torch.randint(1, VOCAB, (SEQUENCES, tokens), generator=random), attention, mask,
        -4 + 0.3 * normal(*shape), -4 + 0.3 * normal(*shape), normal(SEQUENCES), normal(*shape),
    )  # fmt: skip


def token_loss(stats: fastrlhf.ChunkStats, weights: Tensor) -> Tensor:
    return (torch.tanh(0.2 * stats.logprob) * weights).sum() + 0.01 * stats.entropy.square().sum()


POLICY = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.1, "entropy_coef": 0.01}
GSPO = {"ratio_level": "sequence", "reduction": "sequence-mean"}
NORMALIZER = 20.0


def _linear(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    return fastrlhf.model_linear_loss(
        token_loss, model, x.ids, x.attention, x.weights, mask=x.mask, entropy=True, chunk_size=5
    )[0]


def _dpo(model: nn.Module, teacher: nn.Module, x: Batch, loss_type: str = "sigmoid") -> Tensor:
    return fastrlhf.model_dpo_loss(
        model, x.ids, x.attention, x.ref, CHOSEN, REJECTED, 0.3, mask=x.mask, loss_type=loss_type,
        impl="eager",
    )[0]  # fmt: skip


def _policy(model: nn.Module, teacher: nn.Module, x: Batch, **options: Any) -> Tensor:
    return fastrlhf.model_policy_loss(
        model, x.ids, x.attention, x.old, x.advantages, mask=x.mask, ref_logprobs=x.ref, **options
    )[0]


def _packed(model: nn.Module, teacher: nn.Module, x: Batch, **options: Any) -> Tensor:
    """The policy loss of the same tokens without padding."""
    there = x.attention.bool()
    lengths = there.sum(1)

    def of_tokens(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, 1))[there][:-1].unsqueeze(0)

    return fastrlhf.model_policy_loss(
        model, x.ids[there].unsqueeze(0), None, of_tokens(x.old), x.advantages,
        mask=x.mask[there].unsqueeze(0), ref_logprobs=of_tokens(x.ref),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), **options,
    )[0]  # fmt: skip


def _sft(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    return fastrlhf.model_cross_entropy(
        model, x.ids, x.attention, mask=x.mask, normalizer=NORMALIZER
    )[0]


def _of_labels(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    """As a Trainer calls the model, which takes the loss of its labels itself."""
    labels = torch.where(x.mask != 0, x.ids, -100)

    def call() -> Tensor:
        return model(
            input_ids=x.ids, attention_mask=x.attention, labels=labels, use_cache=False,
            num_items_in_batch=NORMALIZER,
        ).loss  # fmt: skip

    return with_fused_loss(model, labels, call)


def _kl(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    return fastrlhf.model_kl_divergence(model, teacher, x.ids, x.attention, mask=x.mask)


def _logits(model: nn.Module, x: Batch) -> Tensor:
    logits = model(input_ids=x.ids, attention_mask=x.attention, use_cache=False).logits
    return logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))


def _log_p(model: nn.Module, x: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens, and entropies."""
    log_p = _logits(model, x).log_softmax(-1)
    logprob = log_p.gather(-1, x.ids[:, 1:, None])[..., 0]
    return logprob, -(log_p.exp() * log_p).sum(-1)


def _linear_of_logits(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    live = x.mask[:, 1:]
    logprob, entropy = (value[live] for value in _log_p(model, x))
    return token_loss(fastrlhf.ChunkStats(logprob, entropy, logprob, None), x.weights[live])


def _dpo_of_logits(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    ratio = ((_log_p(model, x)[0] - x.ref) * x.mask[:, 1:]).sum(-1)
    return -nn.functional.logsigmoid(0.3 * (ratio[CHOSEN] - ratio[REJECTED]))


def _aot_of_logits(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    return fastrlhf.dpo_loss(
        _log_p(model, x)[0], x.ref, CHOSEN, REJECTED, 0.3, mask=x.mask[:, 1:], loss_type="aot",
        impl="eager",
    )[0]  # fmt: skip


def _policy_of_logits(model: nn.Module, teacher: nn.Module, x: Batch, **options: Any) -> Tensor:
    logprob, entropy = _log_p(model, x)
    return fastrlhf.policy_loss(
        logprob, x.old, x.advantages, x.mask[:, 1:], ref_logprobs=x.ref, entropy=entropy, **options
    )[0]


def _sft_of_logits(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    return -(_log_p(model, x)[0] * x.mask[:, 1:]).sum() / NORMALIZER


def _kl_of_logits(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    log_p = _logits(model, x).log_softmax(-1)
    with torch.no_grad():
        log_q = _logits(teacher, x).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1) * x.mask[:, 1:]


Loss = Callable[[nn.Module, nn.Module, Batch], Tensor]


def _weighed(loss: Loss, model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    """Losses one by one of different weights."""
    losses = loss(model, teacher, x)
    return (losses * (PAIR_WEIGHTS if losses.ndim == 1 else x.weights).to(losses)).sum()


def _mean(loss: Loss, model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    return loss(model, teacher, x).mean()


# Inside the model, and of its logits.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "linear": (_linear, _linear_of_logits),
    "dpo": (partial(_mean, _dpo), partial(_mean, _dpo_of_logits)),
    "dpo, weighed": (partial(_weighed, _dpo), partial(_weighed, _dpo_of_logits)),
    "aot": (partial(_mean, partial(_dpo, loss_type="aot")), partial(_mean, _aot_of_logits)),
    "policy": (partial(_policy, **POLICY), partial(_policy_of_logits, **POLICY)),
    "gspo": (partial(_policy, **GSPO), partial(_policy_of_logits, **GSPO)),
    "sft": (_sft, _sft_of_logits),
    "labels": (_of_labels, _sft_of_logits),
    "kl": (partial(_mean, _kl), partial(_mean, _kl_of_logits)),
    "kl, weighed": (partial(_weighed, _kl), partial(_weighed, _kl_of_logits)),
    "packed": (partial(_packed, **POLICY), partial(_policy_of_logits, **POLICY)),
}

# One of each function.
FIVE = ("linear", "dpo", "policy", "sft", "kl")

Gradients = dict[str, Tensor | None]
_OF_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "module.")  # in names of parameters


def own_gradients(model: nn.Module) -> Gradients:
    """Whole gradients of the parameters that are trained, by their names in the model itself."""
    whole: Any = nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model, with_grads=True)
    found = {}
    with whole:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                if gradient is not None:
                    full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                    gradient = full.clone()
                for part in _OF_WRAPPERS:
                    name = name.replace(part, "")
                found[name] = gradient
    return found


def errors(found: Gradients, wanted: Gradients) -> dict[str, float]:
    """The error of each gradient, relative to its own norm: 1 if it is missing or doubled."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    of = {}
    for name, want in wanted.items():
        assert want is not None and float(want.norm()) > 0, f"{name}: nothing to compare"
        got = found[name]
        difference = want if got is None else got.to(want) - want
        of[name] = float(difference.norm() / want.norm())
    return of


def outcome(
    model: nn.Module, loss: Loss, batches: list[Batch], share: float = 1.0
) -> tuple[list[float], Gradients]:
    """Losses of some batches, and gradients of their sum times `share`."""
    model.zero_grad()
    teacher, values = small_model("teacher"), []
    for x in batches:
        value = loss(model, teacher, x)
        (share * value).backward()
        values.append(float(value.detach()))
    return values, own_gradients(model)


class Case(NamedTuple):
    """A wrapped model, and what is done with it."""

    wrap: Callable[[nn.Module], nn.Module]
    kind: str = "plain"
    losses: tuple[str, ...] = FIVE
    wrap_teacher: Callable[[nn.Module], nn.Module] = lambda teacher: teacher
    passes: int = 1  # that gradients are accumulated over
    late_sync: bool = False  # gradients are averaged after the last pass alone
    empty: bool = False  # the second process has no token to score
    rounded: bool = False  # to 16 bits: as accurate as its logits


def _ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


_unused = partial(_ddp, find_unused_parameters=True)
_static = partial(_ddp, static_graph=True)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    enable_checkpointing(model, {"use_reentrant": reentrant})
    return model


def enable_checkpointing(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    """Its old name warns in the transformers that have the new one."""
    from transformers import PreTrainedModel

    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(PreTrainedModel, new) else old)(options)


def _sharded(model: nn.Module, *parts: str, layers: bool = False, **options: Any) -> nn.Module:
    """Shard parts by themselves (FSDP2), then what is left."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    by_name = {"head": base.lm_head, "norm and head": [base.model.norm, base.lm_head]}
    for part in (*(base.model.layers if layers else ()), *(by_name[name] for name in parts)):
        fully_shard(part, **options)
    return fully_shard(model, **options)


def _everything(model: nn.Module, *parts: str, **options: Any) -> nn.Module:
    """No weight is whole outside of its module's call."""
    return _sharded(model, *parts, layers=True, reshard_after_forward=True, **options)


def _with_head(model: nn.Module, **options: Any) -> nn.Module:
    return _everything(model, "head", **options)


def _fsdp1(model: nn.Module, head: bool = False) -> nn.Module:
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    if head:
        model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
    return FullyShardedDataParallel(model, **options)


def _each_part_of_head(model: nn.Module) -> nn.Module:
    for part in model.get_base_model().lm_head.modules():
        if isinstance(part, nn.Linear) and not hasattr(part, "base_layer"):
            fully_shard(part)
    return _layers(model)


def _fsdp1_of_peft(model: nn.Module) -> nn.Module:
    """As Trainers wrap it: each factor of an adapter by itself."""
    from peft.utils.other import fsdp_auto_wrap_policy

    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
    )  # fmt: skip


_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_BF16_OUT = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
)
_KL = ("kl", "kl, weighed")
_layers = partial(_sharded, layers=True)
ALL = tuple(name for name in LOSSES if name != "packed")

CASES: dict[str, dict[str, Case]] = {
    "ddp": {
        "plain": Case(_ddp, losses=(*ALL, "packed")),
        "tied": Case(_ddp, "tied"),
        "unused": Case(_unused),
        "static": Case(_static, losses=(*FIVE, "packed")),
        "static, tied": Case(_static, "tied"),
        "no_sync": Case(_ddp, passes=2, late_sync=True),
        "empty": Case(_ddp, empty=True, losses=ALL),
        "empty, unused": Case(_unused, empty=True),
        "empty, tied": Case(_ddp, "tied", empty=True),
        "scaled": Case(_ddp, "scaled"),
        "scaled, static": Case(_static, "scaled"),
        "lora": Case(_ddp, "lora", losses=("packed", *FIVE)),
        "lora, empty": Case(_ddp, "lora", empty=True),
        "lora head": Case(_ddp, "lora head"),
        "dora head": Case(_ddp, "dora head", losses=ALL),
        "saved head": Case(_ddp, "saved head"),
        "dora head, empty": Case(_ddp, "dora head", empty=True),
        "checkpoint": Case(lambda m: _ddp(checkpointed(m, False))),
        "reentrant": Case(lambda m: _ddp(checkpointed(m, True))),
        "reentrant, static": Case(lambda m: _static(checkpointed(m, True))),
    },
    "fsdp2": {
        "root": Case(_sharded),
        "root, tied": Case(_sharded, "tied"),
        "layers": Case(_layers, losses=(*ALL, "packed")),
        "layers, tied": Case(_layers, "tied"),
        "head": Case(lambda m: _sharded(m, "head")),
        "norm and head": Case(lambda m: _sharded(m, "norm and head", layers=True)),
        "everything": Case(_with_head, losses=("packed", *ALL)),
        "everything, tied": Case(_everything, "tied", losses=ALL),
        "accumulated": Case(_with_head, passes=2),
        "accumulated, late": Case(_with_head, passes=2, late_sync=True),
        "empty": Case(_with_head, empty=True, losses=ALL),
        "scaled": Case(_with_head, "scaled"),
        "bf16": Case(partial(_with_head, mp_policy=_BF16), rounded=True),
        "bf16 output": Case(partial(_with_head, mp_policy=_BF16_OUT), rounded=True),
        "lora": Case(_with_head, "lora"),
        "lora head": Case(_with_head, "lora head"),
        "dora head": Case(_with_head, "dora head"),
        "saved head": Case(_with_head, "saved head"),
        "each part of the head": Case(_each_part_of_head, "lora head"),
        "checkpoint": Case(lambda m: _with_head(checkpointed(m, False))),
        "reentrant": Case(lambda m: _with_head(checkpointed(m, True))),
        "teacher": Case(_layers, wrap_teacher=_layers, losses=_KL),
        # Not weighed, for which a trained head would need the teacher's once more.
        "teacher's head": Case(_with_head, wrap_teacher=_with_head, losses=("kl",)),
        "teacher's head, lora": Case(_with_head, "lora", wrap_teacher=_with_head, losses=_KL),
        "FSDP1": Case(_fsdp1, losses=(*FIVE, "labels")),
        "FSDP1, head": Case(partial(_fsdp1, head=True), losses=ALL),
        "FSDP1, peft": Case(_fsdp1_of_peft, "lora head"),
    },
}  # fmt: skip


class Row(NamedTuple):
    """How far one loss is from what is wanted, in one of the processes."""

    rank: int
    case: str
    loss: str
    error: float = 0.0  # relative, the worst
    of: str = ""  # a parameter, or the loss of a pass
    allowed: float = 0.0
    trouble: str = ""  # where it could not be computed

    @property
    def fails(self) -> bool:
        return bool(self.trouble) or not self.error <= self.allowed

    def __str__(self) -> str:
        what = self.trouble or f"{self.of} is off by {self.error:.1e}, not {self.allowed:.1e}"
        return f"{self.case}, {self.loss}, process {self.rank}: {what}"


def _passes(case: Case, model: nn.Module, teacher: nn.Module, loss: Loss, rank: int) -> list[float]:
    """Losses of this process' batches; their gradients are left in the model."""
    values = []
    for i in range(case.passes):
        last, waiting = i == case.passes - 1, nullcontext()
        if case.late_sync and isinstance(model, DistributedDataParallel):
            waiting = nullcontext() if last else model.no_sync()
        elif case.late_sync:
            model.set_requires_gradient_sync(last)
        with waiting:
            x = make_batch(2 * i + rank, nothing=case.empty and rank == 1)
            value = loss(model, teacher, x)
            value.backward()
        values.append(float(value.detach()))
    return values


@cache
def _expected(kind: str, loss: str, passes: int, empty: bool) -> tuple[list[float], Gradients]:
    batches = [make_batch(i, nothing=empty and i % 2 == 1) for i in range(2 * passes)]
    return outcome(small_model(kind), LOSSES[loss][1], batches, 0.5)


def _row(name: str, case: Case, loss: str, model: Any, teacher: Any, rank: int) -> Row:
    of_batches, wanted = _expected(case.kind, loss, case.passes, case.empty)

    def run(function: Loss) -> dict[str, float]:
        model.zero_grad()
        values = _passes(case, model, teacher, function, rank)
        found = errors(own_gradients(model), wanted)
        for i, value in enumerate(values):
            want = of_batches[2 * i + rank]
            found[f"the loss of pass {i}"] = abs(value - want) / max(abs(want), 1.0)
        return found

    of = run(LOSSES[loss][0])
    allowed = dict.fromkeys(of, TOLERANCE)
    if case.rounded:
        allowed = {key: 2 * error + 2**-8 for key, error in run(LOSSES[loss][1]).items()}
    worst = max(of, key=lambda key: of[key] / allowed[key])
    return Row(rank, name, loss, of[worst], worst, allowed[worst])


# Whose gradient of a trained head is made in the call of the head, and others.
MADE_IN_THE_CALL = (*FIVE, "gspo")
MADE_IN_BACKWARD = ("dpo, weighed", "aot", "kl, weighed")


def _when_head_is_multiplied(loss: str, rank: int) -> Row:
    """How often, in backward, a matmul of the vocabulary is made; how much of the head's weight is
    there before.
    """
    model, weights = _with_head(small_model()), []
    model.lm_head.register_forward_pre_hook(lambda head, _: weights.append(head.weight))
    value = LOSSES[loss][0](model, small_model("teacher"), make_batch(rank))
    there = sum(weight.untyped_storage().nbytes() for weight in weights)
    with MatmulAudit() as audit:
        value.backward()
    trouble = f"{there} bytes of the head are there after its call" if there or not weights else ""
    return Row(rank, "sharded head", loss, float(VOCAB in audit.sides), "", 0.0, trouble)


def _refusals(rank: int) -> list[Row]:
    """What cannot be computed, and what is said of it."""
    x, rows = make_batch(rank), []

    def gone_in_backward() -> None:
        model, teacher = _with_head(small_model()), _with_head(small_model("teacher"))
        LOSSES["kl, weighed"][0](model, teacher, x).backward()

    def tensor_parallel() -> None:
        model = small_model()
        # Not by the vocabulary: see tests/test_tensor_parallel.py for that.
        plan = {"lm_head": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        LOSSES["linear"][0](model, model, x)

    for what in (gone_in_backward, tensor_parallel):
        try:
            what()
        except RuntimeError as error:
            rows.append(Row(rank, what.__name__, "", trouble=str(error)))
    return rows


def compare(rank: int, folder: str, family: str, only: tuple[str, ...] = ()) -> None:
    """Run the cases of a family in one of two processes, and write down how they went."""
    warnings.simplefilter("ignore")  # of the wrappers themselves
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    rows = []
    try:
        for name, case in CASES[family].items():
            if only and name not in only:
                continue
            model = case.wrap(small_model(case.kind))
            teacher = case.wrap_teacher(small_model("teacher"))
            for loss in case.losses:
                try:
                    rows.append(_row(name, case, loss, model, teacher, rank))
                except Exception:
                    rows.append(Row(rank, name, loss, trouble=traceback.format_exc()))
                    # What a backward leaves behind that ends halfway is wrong for the next.
                    model = case.wrap(small_model(case.kind))
        if family == "fsdp2" and not only:
            rows += [_when_head_is_multiplied(loss, rank)
                     for loss in (*MADE_IN_THE_CALL, *MADE_IN_BACKWARD)]  # fmt: skip
            rows += _refusals(rank)
    finally:
        Path(folder, f"{family}-{rank}.json").write_text(json.dumps(rows))
    # The process ends here. A wrapper that dies as the last to hold its process group can wait for
    # ever for a thread of that, which waits for the interpreter.
    torch.distributed.barrier()
    os._exit(0)


def rows_of(folder: Path, family: str) -> list[Row]:
    """What both processes wrote down."""
    texts = (Path(folder, f"{family}-{rank}.json").read_text() for rank in range(2))
    return [Row(*row) for text in texts for row in json.loads(text)]
