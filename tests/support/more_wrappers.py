"""Losses inside the forward of models that FSDP2, DeepSpeed or accelerate prepare, in some
processes, against the same losses of the logits of a model that nothing wraps.

Each process has a batch of its own. What is wanted are the gradients of the mean over all.
"""

import os
import traceback
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import fastrlhf

from .fake_zero import FakeZero3
from .wrapped_losses import (
    FIVE,
    LOSSES,
    TOLERANCE,
    Batch,
    Gradients,
    Loss,
    Row,
    checkpointed,
    errors,
    make_batch,
    outcome,
    own_gradients,
    small_model,
    token_loss,
)


def _of_tokens(stats: Any, x: Batch) -> Tensor:
    live = x.mask[:, 1:]
    logprob, entropy = stats.logprob[live], stats.entropy[live]
    return token_loss(fastrlhf.ChunkStats(logprob, entropy, logprob, None), x.weights[live])


def _model_stats(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    stats = fastrlhf.model_token_stats(model, x.ids, x.attention, mask=x.mask, entropy=True)
    return _of_tokens(stats, x)


def _head_stats(model: nn.Module, teacher: nn.Module, x: Batch, read: bool = False) -> Tensor:
    """The head outside of its model's forward, as `head_inputs` or as `lm_head` gives it."""
    hidden, head = fastrlhf.head_inputs(model, x.ids, x.attention)
    if read:
        head = fastrlhf.lm_head(model)
    targets = x.ids[:, 1:].masked_fill(~x.mask[:, 1:], -100)
    stats = fastrlhf.linear_token_stats(
        hidden[:, :-1], head.weight, targets, entropy=True, **head.options()
    )
    return _of_tokens(stats, x)


_of_logits = LOSSES["linear"][1]
ALL_LOSSES: dict[str, tuple[Loss, Loss]] = LOSSES | {
    "stats": (_model_stats, _of_logits),
    "head_inputs": (_head_stats, _of_logits),
    "lm_head": (partial(_head_stats, read=True), _of_logits),
}
SIX = ("stats", *FIVE)
EVERY = ("stats", *(name for name in LOSSES if name != "packed"))
HEAD = ("head_inputs", "lm_head")


class Wrapped(NamedTuple):
    """A model in its wrapper, and how one trains it."""

    model: nn.Module
    backward: Callable[[Tensor], Any] = Tensor.backward
    gradients: Callable[[], Gradients] | None = None
    clear: Callable[[], Any] | None = None


class Case(NamedTuple):
    """What wraps a model, and what is done with it."""

    wrap: Callable[[nn.Module, Any], Wrapped]  # given a group
    kind: str = "plain"
    losses: tuple[str, ...] = SIX
    refuses: bool = False  # the head outside of its model's forward
    ranks: int = 2
    rounded: bool = False  # to 16 bits: as accurate as its logits
    dtype: torch.dtype = torch.float32
    uneven: str = ""  # "short": further processes have fewer tokens; "empty": none to score
    wrap_teacher: Callable[[nn.Module, Any], nn.Module] = lambda teacher, group: teacher


def _averaged(model: nn.Module, group: Any) -> Gradients:
    """Gradients, of which the wrapper has averaged those of sharded parameters."""
    found = own_gradients(model)
    sharded = {name for name, p in model.named_parameters() if hasattr(p, "full_tensor")}
    for name in sorted(found.keys() - sharded):  # alike in all processes
        gradient = found[name]
        assert gradient is not None
        dist.all_reduce(gradient, group=group)
        found[name] = gradient / group.size()
    return found


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _shard(
    model: Any, group: Any, *parts: str, options: dict[str, dict[str, Any]] | None = None,
    hybrid: bool = False, **common: Any,
) -> Wrapped:  # fmt: skip
    """Shard (FSDP2) some parts of a model one by one, with options of all and of each."""
    if hybrid:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
    base = _base(model)
    modules: dict[str, list[Any]] = {
        "layers": list(base.model.layers), "head": [base.lm_head], "root": [model],
        "norm and head": [[base.model.norm, base.lm_head]], "backbone": [base.model],
        "tied ends": [[base.model.embed_tokens, base.model.norm, base.lm_head]],
    }  # fmt: skip
    for name in parts:
        for module in modules[name]:
            fully_shard(module, mesh=mesh, **common, **(options or {}).get(name, {}))
    return Wrapped(model, gradients=partial(_averaged, model, group))


def _head_left_out(model: Any, group: Any) -> Wrapped:
    return _shard(model, group, "root", ignored_params={model.lm_head.weight})


def _each_part(model: Any, group: Any) -> Wrapped:
    """An adapted head of which each linear module is sharded by itself."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for part in _base(model).lm_head.modules():
        if isinstance(part, nn.Linear) and not hasattr(part, "base_layer"):
            fully_shard(part, mesh=mesh)
    return _shard(model, group, "layers", "root")


def _after_a_forward(model: Any, group: Any) -> Wrapped:
    """Sharded, but what a forward has made whole stays so until the next backward."""
    wrapped = _shard(model, group, *_ENDS, options=_KEPT_ENDS)
    with torch.no_grad():
        wrapped.model(input_ids=make_batch(0).ids)
    return wrapped


def _fake(model: nn.Module, group: Any, ahead: bool = False) -> Wrapped:
    engine = FakeZero3(model, group, ahead=ahead)
    return Wrapped(engine, engine.backward, engine.gradients, engine.zero_grad)


def _fake_of_a_teacher(teacher: nn.Module, group: Any) -> nn.Module:
    return FakeZero3(teacher.requires_grad_(False), group)


def _checkpointed(wrap: Callable[..., Wrapped], model: nn.Module, group: Any) -> Wrapped:
    return wrap(checkpointed(model, False), group)


def _as_launched(group: Any) -> None:
    """Set what a launcher of several processes sets."""
    rank, world = str(group.rank()), str(group.size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29500", "WORLD_SIZE": world, "LOCAL_SIZE": world,
                   "LOCAL_WORLD_SIZE": world}  # fmt: skip


def _zero(
    model: nn.Module, group: Any, stage: int, *, threshold: int = 0, bf16: bool = False
) -> Wrapped:
    """DeepSpeed's engine. Stage 3 keeps parameters whole that are not above the threshold."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    _as_launched(group)
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "communication_data_type": "fp32",
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold},
    }  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(trained, lr=1e-3), config=config,
        dist_init_required=False,
    )  # fmt: skip

    def gradients() -> Gradients:
        of = deepspeed.utils.safe_get_full_grad
        named = engine.module.named_parameters()
        return {name: of(p).clone() for name, p in named if p.requires_grad}

    return Wrapped(engine, engine.backward, gradients, engine.optimizer.zero_grad)


def _zero_3_of_a_teacher(teacher: nn.Module, group: Any) -> nn.Module:
    """DeepSpeed's engine of a model that is not trained, which shards it all the same."""
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=teacher.requires_grad_(False).eval(), dist_init_required=False,
        config={"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero},
    )  # fmt: skip
    return engine


def _accelerated(
    model: nn.Module, group: Any, *, shard: bool = False, precision: str = "no"
) -> Wrapped:
    """What accelerate prepares. By itself it shards on accelerators alone: on a CPU it is told that
    it is to.
    """
    import accelerate

    _as_launched(group)
    accelerate.state.AcceleratorState._reset_state(True)
    prepares = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    if shard:
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], reshard_after_forward=True,
        )  # fmt: skip
        if precision != "no":
            plugin.set_mixed_precision(precision)
        prepares.state.fsdp_plugin = plugin
        for state in (prepares.state, accelerate.PartialState()):
            state.distributed_type = accelerate.DistributedType.FSDP
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = prepares.prepare(model, torch.optim.SGD(trained, lr=1e-3))
    assert shard == isinstance(model, torch.distributed.fsdp.FSDPModule)
    return Wrapped(model, prepares.backward)


def _precision(**options: Any) -> dict[str, Any]:
    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} | options
    return {"mp_policy": MixedPrecisionPolicy(**policy)}


def _sharded(*parts: str, **options: Any) -> Callable[..., Wrapped]:
    def wrap(model: nn.Module, group: Any) -> Wrapped:
        return _shard(model, group, *parts, **options)

    return wrap


_ENDS = ("layers", "norm and head", "root")
_EACH = ("layers", "head", "root")
_OF_COLUMNS = {"head": {"shard_placement_fn": lambda _: Shard(1)}}
_KEPT_ENDS = {"norm and head": {"reshard_after_forward": False}}
_fp32 = _precision(param_dtype=torch.float32)
_three = partial(_zero, stage=3)
_KL = ("kl", "kl, weighed")

CASES: dict[str, dict[str, Case]] = {
    "fsdp2": {
        "head alone": Case(_sharded("head"), refuses=True),
        "backbone alone": Case(_sharded("backbone"), losses=(*SIX, *HEAD)),
        "head left out": Case(_head_left_out, losses=(*SIX, *HEAD)),
        "ends as torchtitan": Case(
            _sharded(*_ENDS, options=_KEPT_ENDS), losses=EVERY, refuses=True
        ),
        "after a forward": Case(_after_a_forward, losses=("lm_head",)),
        "tied ends": Case(_sharded("layers", "tied ends", "root"), "tied", refuses=True),
        "root, resharded": Case(_sharded("root", reshard_after_forward=True), refuses=True),
        "never resharded": Case(
            _sharded(*_EACH, reshard_after_forward=False), losses=EVERY, refuses=True
        ),
        "head by columns": Case(_sharded(*_EACH, options=_OF_COLUMNS), losses=EVERY, refuses=True),
        "offloaded": Case(
            _sharded(*_EACH, offload_policy=CPUOffloadPolicy(pin_memory=False)), refuses=True
        ),
        "lora": Case(_sharded(*_ENDS), "lora", losses=EVERY, refuses=True),
        "lora head": Case(_sharded(*_ENDS), "lora head", refuses=True),
        "each part of a head": Case(_each_part, "lora head", losses=EVERY, uneven="short"),
        "each part, empty": Case(_each_part, "lora head", losses=EVERY, uneven="empty"),
        "bf16 parameters": Case(_sharded(*_ENDS), rounded=True, dtype=torch.bfloat16, refuses=True),
        "bf16": Case(_sharded(*_ENDS, **_precision()), rounded=True),
        "bf16, no inputs cast": Case(
            _sharded(*_ENDS, **_precision(cast_forward_inputs=False)), rounded=True
        ),
        "bf16, sums too": Case(
            _sharded(*_ENDS, **_precision(reduce_dtype=torch.bfloat16)), rounded=True
        ),
        "bf16 but the head": Case(
            _sharded(*_EACH, options={"layers": _precision(), "root": _precision(), "head": _fp32}),
            rounded=True,
        ),
        "bf16 head": Case(_sharded(*_EACH, options={"head": _precision()}), rounded=True),
        "bf16, lora": Case(_sharded(*_ENDS, **_precision()), "lora", rounded=True),
    },
    "hsdp": {
        "root": Case(_sharded("root", hybrid=True), ranks=4, refuses=True),
        "head": Case(_sharded(*_EACH, hybrid=True), ranks=4, refuses=True),
        "norm and head": Case(_sharded(*_ENDS, hybrid=True), losses=EVERY, ranks=4, refuses=True),
        "lora": Case(_sharded(*_ENDS, hybrid=True), "lora", ranks=4, refuses=True),
        "bf16": Case(_sharded(*_ENDS, hybrid=True, **_precision()), ranks=4, rounded=True),
        "resharded to two of four": Case(
            _sharded(*_EACH, reshard_after_forward=2), ranks=4, refuses=True
        ),
    },
    "fake ZeRO-3": {
        "plain": Case(_fake, losses=EVERY, refuses=True),
        "tied": Case(_fake, "tied", losses=EVERY, refuses=True),
        "scaled": Case(_fake, "scaled", refuses=True),
        "lora": Case(_fake, "lora", losses=EVERY, refuses=True),
        "lora head": Case(_fake, "lora head", refuses=True),
        "lora head, uneven": Case(_fake, "lora head", losses=EVERY, uneven="short"),
        "lora head, empty": Case(_fake, "lora head", losses=EVERY, uneven="empty"),
        "lora head, ahead": Case(partial(_fake, ahead=True), "lora head", refuses=True),
        "teacher": Case(_fake, losses=_KL, wrap_teacher=_fake_of_a_teacher),
        "checkpoint": Case(partial(_checkpointed, _fake), refuses=True),
    },
    "accelerate": {
        "ddp": Case(_accelerated, losses=(*EVERY, *HEAD)),
        "ddp, lora": Case(_accelerated, "lora", losses=(*SIX, *HEAD)),
        "ddp, bf16": Case(partial(_accelerated, precision="bf16"), rounded=True),
        "fsdp2": Case(partial(_accelerated, shard=True), losses=EVERY, refuses=True),
        "fsdp2, tied": Case(partial(_accelerated, shard=True), "tied", refuses=True),
        "fsdp2, bf16": Case(partial(_accelerated, shard=True, precision="bf16"), rounded=True),
    },
    "deepspeed": {
        "ZeRO-1": Case(partial(_zero, stage=1), losses=(*SIX, *HEAD)),
        "ZeRO-1, lora": Case(partial(_zero, stage=1), "lora", losses=(*SIX, *HEAD)),
        "ZeRO-2": Case(partial(_zero, stage=2), losses=(*EVERY, *HEAD)),
        "ZeRO-2, tied": Case(partial(_zero, stage=2), "tied", losses=(*SIX, *HEAD)),
        "ZeRO-2, lora": Case(partial(_zero, stage=2), "lora", losses=(*SIX, *HEAD)),
        "ZeRO-2, bf16": Case(partial(_zero, stage=2, bf16=True), rounded=True),
        "ZeRO-3": Case(_three, losses=EVERY, refuses=True),
        "ZeRO-3, tied": Case(_three, "tied", losses=EVERY, refuses=True),
        "ZeRO-3, scaled": Case(_three, "scaled", refuses=True),
        "ZeRO-3, lora": Case(_three, "lora", losses=EVERY, refuses=True),
        "ZeRO-3, lora head": Case(_three, "lora head", refuses=True),
        "ZeRO-3, lora head, uneven": Case(_three, "lora head", losses=EVERY, uneven="short"),
        "ZeRO-3, lora head, empty": Case(_three, "lora head", losses=EVERY, uneven="empty"),
        "ZeRO-3, lora head, factors kept whole": Case(
            partial(_zero, stage=3, threshold=500), "lora head", refuses=True
        ),
        "ZeRO-3, dora head": Case(_three, "dora head", refuses=True),
        "ZeRO-3, teacher": Case(_three, losses=_KL, wrap_teacher=_zero_3_of_a_teacher),
        "ZeRO-3, teacher, lora": Case(
            _three, "lora", losses=_KL, wrap_teacher=_zero_3_of_a_teacher
        ),
        "ZeRO-3, checkpoint": Case(partial(_checkpointed, _three), refuses=True),
        "ZeRO-3, head kept whole": Case(
            partial(_zero, stage=3, threshold=4000), losses=(*SIX, *HEAD)
        ),
        "ZeRO-3, bf16": Case(partial(_zero, stage=3, bf16=True), rounded=True),
    },
}


def _batch(rank: int, uneven: str) -> Batch:
    if not rank or not uneven:
        return make_batch(rank)
    return make_batch(rank, nothing=True) if uneven == "empty" else make_batch(rank, tokens=6)


@cache
def _expected(kind: str, loss: str, ranks: int, uneven: str) -> tuple[list[float], Gradients]:
    batches = [_batch(rank, uneven) for rank in range(ranks)]
    return outcome(small_model(kind), ALL_LOSSES[loss][1], batches, 1 / ranks)


def _row(case: Case, name: str, loss: str, wrapped: Wrapped, group: Any) -> Row:
    rank, teacher = group.rank(), case.wrap_teacher(small_model("teacher"), group)
    losses, wanted = _expected(case.kind, loss, group.size(), case.uneven)

    def run(function: Loss) -> dict[str, float]:
        (wrapped.clear or wrapped.model.zero_grad)()
        value = function(wrapped.model, teacher, _batch(rank, case.uneven))
        wrapped.backward(value)
        found = wrapped.gradients() if wrapped.gradients else own_gradients(wrapped.model)
        want = losses[rank]
        off = abs(float(value.detach()) - want) / max(abs(want), 1.0)
        return errors(found, wanted) | {"the loss": off}

    of = run(ALL_LOSSES[loss][0])
    allowed = dict.fromkeys(of, TOLERANCE)
    if case.rounded:
        allowed = {key: 2 * error + 2**-8 for key, error in run(ALL_LOSSES[loss][1]).items()}
    worst = max(of, key=lambda key: of[key] / allowed[key])
    return Row(rank, name, loss, of[worst], worst, allowed[worst])


def refusals(name: str, model: nn.Module, rank: int = 0) -> list[Row]:
    """What is wrong about how a head is refused that is whole in its model's forward alone."""
    return [_refusal(name, call, model, rank) for call in ("lm_head", "head_inputs")]


def _refusal(name: str, call: str, model: nn.Module, rank: int) -> Row:
    trouble = "no error"
    try:
        if call == "lm_head":
            fastrlhf.lm_head(model)
        else:
            fastrlhf.head_inputs(model, make_batch(rank).ids)
    except RuntimeError as error:
        trouble = "" if "use model_token_stats" in str(error) else traceback.format_exc()
    return Row(rank, name, f"{call}, refused", trouble=trouble)


def refusals_of_gathered_heads(group: Any) -> list[Row]:
    """The same of heads that are whole when they are asked for, but not after a forward."""
    rows = []
    for call in ("lm_head", "head_inputs"):
        sharded: Any = _shard(small_model(), group, *_EACH, reshard_after_forward=True).model
        sharded(make_batch(0).ids).logits.sum().backward()  # after which FSDP2 knows its root
        sharded.lm_head.unshard()
        rows.append(_refusal("FSDP2", call, sharded, group.rank()))
        engine: Any = _fake(small_model(), group).model
        engine.gather(engine.module.lm_head.weight)
        rows.append(_refusal("fake ZeRO-3", call, engine, group.rank()))
    return rows


def compare(group: Any, family: str, name: str) -> list[Row]:
    """Run a case in one of the processes of a group."""
    case, rank = CASES[family][name], group.rank()

    def fresh() -> Wrapped:
        return case.wrap(small_model(case.kind, case.dtype), group)

    wrapped = fresh()
    rows = refusals(name, wrapped.model, rank) if case.refuses else []
    for loss in case.losses:
        try:
            rows.append(_row(case, name, loss, wrapped, group))
        except Exception:
            rows.append(Row(rank, name, loss, trouble=traceback.format_exc()))
            wrapped = fresh()  # what a backward leaves behind that ends halfway is wrong
    return rows + (refusals(name, wrapped.model, rank) if case.refuses else [])
