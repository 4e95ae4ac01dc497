"""Plain training loops of models that something wraps, with lazy logits and without.

Wanted are losses and gradients of the same model in fp64, which nothing wraps. What is found with
lazy logits may be off by little more than what is found without them.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import fastrlhf

from . import tensor_parallel, wrapped_losses
from .more_wrappers import Wrapped, _accelerated, _each_part, _fake, _shard
from .wrapped_losses import Batch, Gradients, Loss, checkpointed, make_batch, small_model

BF16 = torch.bfloat16


def of_labels(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    """The loss that the model computes by itself."""
    labels = x.ids.masked_fill(~x.mask, -100)
    return model(input_ids=x.ids, attention_mask=x.attention, labels=labels, use_cache=False).loss


# Each of logits, as a loop has it that knows nothing of this library.
LOOPS: dict[str, Loss] = {"labels": of_labels} | {
    name: wrapped_losses.LOSSES[name][1] for name in ("linear", "dpo, weighed", "policy", "kl")
}


def built(model: nn.Module, teacher: nn.Module, x: Batch) -> Tensor:
    """What is not fused, beside what is."""
    logits = model(input_ids=x.ids, attention_mask=x.attention, use_cache=False).logits
    logprob = logits.float().log_softmax(-1).gather(-1, x.ids[..., None])
    return (logits.sigmoid().mean() + logprob.tanh().mean()).to(logprob.dtype)


@contextmanager
def warnings_of_builds() -> Iterator[list[str]]:
    """What the log says of logits that are built."""
    said: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("fastrlhf.lazy"), Keeps()
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    fastrlhf.lazy_report(clear=True)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextmanager
def lazy(*models: nn.Module) -> Iterator[None]:
    """Lazy logits of several models."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(fastrlhf.lazy_logits(model))
        yield


def run(wrapped: Wrapped, loss: Loss, teacher: nn.Module, x: Batch) -> tuple[float, Gradients]:
    """A loss, and the gradients that its backward leaves in the parameters."""
    (wrapped.clear or wrapped.model.zero_grad)()
    torch.manual_seed(5)
    value = loss(wrapped.model, teacher, x)
    wrapped.backward(value)
    found = (
        wrapped.gradients() if wrapped.gradients else wrapped_losses.own_gradients(wrapped.model)
    )
    return float(value.detach()), found


@cache
def wanted(kind: str, name: str, seeds: tuple[int, ...]) -> tuple[list[float], Gradients]:
    """Of the model in fp64, with the mean over some batches."""
    loss = built if name == "built" else LOOPS[name]
    return wrapped_losses.outcome(
        small_model(kind, torch.float64),
        loss,
        [make_batch(i) for i in seeds],
        1 / len(seeds),
    )


def off(found: tuple[float, Gradients], want: float, gradients: Gradients) -> dict[str, float]:
    """Relative errors of the loss and of each gradient."""
    value, of = found
    error = abs(value - want) / max(abs(want), 1.0)
    return wrapped_losses.errors(of, gradients) | {"the loss": error}


def worse(lazy: dict[str, float], plain: dict[str, float], eps: float) -> list[str]:
    """Where the error with lazy logits is above what rounding makes of the plain loop.

    eps: of the dtype that the model computes in. A loss is one number, of which plain rounding may
    be next to nothing by chance: it is measured by the worst of the plain loop's errors.
    """
    of_rounding = plain | {"the loss": max(plain.values())}
    return [
        f"{name} is off by {error:.1e}, plain by {of_rounding[name]:.1e}"
        for name, error in lazy.items()
        if not error <= 3 * of_rounding[name] + 4 * eps
    ]


GOES = "the weight of the head is not there after its call"


class Case:
    """A way to wrap a model."""

    def __init__(
        self, wrap: Callable[[nn.Module, Any], Any], kind: str = "plain", *,
        eps: float = torch.finfo(torch.float32).eps, builds: str = "", before: bool = False,
        one_batch: bool = False,
    ):  # fmt: skip
        self.wrap, self.kind = wrap, kind
        self.eps = eps  # of the dtype that the wrapper computes in
        self.builds = builds  # why logits are built, as the log says it
        self.before = before  # lazy logits are enabled before the model is wrapped
        self.one_batch = one_batch  # the same in all processes


def _ddp(model: nn.Module, group: Any, **options: Any) -> Wrapped:
    return Wrapped(DistributedDataParallel(model, process_group=group, **options))


def _checkpointed(wrap: Callable[..., Wrapped], reentrant: bool) -> Callable[..., Wrapped]:
    return lambda model, group: wrap(checkpointed(model, reentrant), group)


def _sharded(*parts: str, **options: Any) -> Callable[..., Wrapped]:
    return lambda model, group: _shard(model, group, *parts, **options)


def _rounded(**options: Any) -> dict[str, Any]:
    policy = {"param_dtype": BF16, "reduce_dtype": torch.float32} | options
    return {"mp_policy": MixedPrecisionPolicy(**policy)}


def _fsdp1(model: nn.Module, group: Any, head: bool = False) -> Wrapped:
    return Wrapped(wrapped_losses._fsdp1(model, head=head))


def _cut(cut: Callable[..., nn.Module], model: nn.Module, group: Any) -> Wrapped:
    return Wrapped(cut(model, group))


_static = partial(_ddp, static_graph=True)
_EPS = torch.finfo(BF16).eps
_ENDS = ("layers", "norm and head", "root")
_EACH = ("layers", "head", "root")

CASES: dict[str, Case] = {
    "ddp": Case(_ddp),
    "ddp, tied": Case(_ddp, "tied"),
    "ddp, enabled before": Case(_ddp, before=True),
    "ddp, unused": Case(partial(_ddp, find_unused_parameters=True)),
    "ddp, static": Case(_static),
    "ddp, bucket views": Case(partial(_ddp, gradient_as_bucket_view=True)),
    "ddp, lora": Case(_ddp, "lora"),
    "ddp, lora head": Case(_ddp, "lora head"),
    "ddp, dora head": Case(_ddp, "dora head"),
    "ddp, saved head": Case(_ddp, "saved head"),
    "ddp, checkpoint": Case(_checkpointed(_ddp, False)),
    "ddp, reentrant": Case(_checkpointed(_static, True)),
    "fsdp2, root": Case(_sharded("root")),
    "fsdp2, root, resharded": Case(_sharded("root", reshard_after_forward=True)),
    "fsdp2, layers": Case(_sharded("layers", "root")),
    "fsdp2, head": Case(_sharded(*_EACH)),
    "fsdp2, head, resharded": Case(_sharded(*_EACH, reshard_after_forward=True)),
    "fsdp2, head, enabled before": Case(_sharded(*_EACH, reshard_after_forward=True), before=True),
    "fsdp2, head alone": Case(_sharded("head", reshard_after_forward=True)),
    "fsdp2, norm and head": Case(_sharded(*_ENDS, reshard_after_forward=True)),
    "fsdp2, never resharded": Case(_sharded(*_EACH, reshard_after_forward=False)),
    "fsdp2, tied": Case(_sharded("layers", "root", reshard_after_forward=True), "tied"),
    "fsdp2, tied ends": Case(_sharded("layers", "tied ends", "root"), "tied"),
    "fsdp2, offloaded": Case(_sharded(*_EACH, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "fsdp2, bf16": Case(_sharded(*_EACH, **_rounded()), eps=_EPS),
    "fsdp2, bf16, output": Case(_sharded(*_EACH, **_rounded(output_dtype=BF16)), eps=_EPS),
    "fsdp2, bf16, fp32 output": Case(
        _sharded(*_ENDS, **_rounded(output_dtype=torch.float32)), eps=_EPS
    ),
    "fsdp2, lora": Case(_sharded(*_ENDS), "lora"),
    "fsdp2, lora head": Case(_sharded(*_EACH), "lora head"),
    "fsdp2, dora head": Case(_sharded(*_EACH), "dora head", builds=GOES),
    "fsdp2, each part of the head": Case(_each_part, "lora head", builds=GOES),
    "fsdp2, checkpoint": Case(_checkpointed(_sharded(*_EACH), False)),
    "fsdp1": Case(_fsdp1, builds=GOES),
    "fsdp1, head": Case(partial(_fsdp1, head=True), builds=GOES),
    "zero-3": Case(_fake, builds=GOES),
    "zero-3, lora head": Case(_fake, "lora head", builds=GOES),
    "accelerate, ddp": Case(_accelerated),
    "accelerate, ddp, bf16": Case(partial(_accelerated, precision="bf16"), eps=_EPS),
    "accelerate, fsdp2": Case(partial(_accelerated, shard=True)),
    "accelerate, fsdp2, bf16": Case(partial(_accelerated, shard=True, precision="bf16"), eps=_EPS),
    "tensor parallel": Case(
        partial(_cut, tensor_parallel.gathered), builds="tensor parallel", one_batch=True
    ),
    "tensor parallel, sharded output": Case(
        partial(_cut, tensor_parallel.sequence_parallel), builds="tensor parallel", one_batch=True
    ),
}


def compare(group: Any, name: str) -> list[str]:
    """What is wrong about a case, in one of the processes of a group."""
    case, rank = CASES[name], group.rank()
    seeds = (0,) if case.one_batch else tuple(range(group.size()))
    seed = 0 if case.one_batch else rank
    x, teacher, troubles = make_batch(seed), small_model("teacher"), []
    first, second = (small_model(case.kind) for _ in range(2))
    if case.before:
        fastrlhf.enable_lazy_logits(second)
    plain = case.wrap(first, group)
    loops = LOOPS | {"built": built}
    of_plain = {loop: run(plain, loss, teacher, x) for loop, loss in loops.items()}
    wrapped = case.wrap(second, group)
    with warnings_of_builds() as said, lazy(wrapped.model, teacher):
        for loop, loss in loops.items():
            values, gradients = wanted(case.kind, loop, seeds)
            of_lazy = off(run(wrapped, loss, teacher, x), values[seed], gradients)
            expected = off(of_plain[loop], values[seed], gradients)
            troubles += [f"{loop}: {text}" for text in worse(of_lazy, expected, case.eps)]
    # In a divergence from built logits, those of the teacher are built, which nothing wraps.
    told = [text for text in said if case.builds in text] if case.builds else said
    if len(told) != 1 or (not case.builds and "sigmoid builds" not in said[0]):
        troubles.append(f"it was said {said}")
    return troubles


def differences(
    make: Callable[[], nn.Module], loops: dict[str, Loss] = LOOPS, *,
    around: Callable[[], Any] = nullcontext, eps: float = torch.finfo(torch.float32).eps,
) -> list[str]:  # fmt: skip
    """Where a model with lazy logits is not what it is without them, in one process.

    around: a context that loops run in, but those of the model in fp64.
    """
    x, troubles = make_batch(0), []
    exact, plain, model = Wrapped(make().double()), Wrapped(make()), Wrapped(make())
    teacher, lazy_teacher = small_model("teacher"), small_model("teacher")
    with warnings_of_builds() as said, lazy(model.model, lazy_teacher):
        for loop, loss in loops.items():
            values, gradients = run(exact, loss, teacher, x)

            def inside(*args: Any, loss: Loss = loss) -> Tensor:
                with around():
                    return loss(*args)

            expected = off(run(plain, inside, teacher, x), values, gradients)
            found = off(run(model, inside, lazy_teacher, x), values, gradients)
            troubles += [f"{loop}: {text}" for text in worse(found, expected, eps)]
    return troubles + said
