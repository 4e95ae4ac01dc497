"""Whatever is done with lazy logits, in whatever order, gives what it gives with plain ones."""

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastrlhf
from fastrlhf.lazy.source import Source

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import budget
from support.lazy_programs import ENDS, MAPS, OPERATIONS, VIEWS, WRITES, Step, run
from support.tiny_models import SMALL, transformers

VOCAB = 11
IDS = torch.arange(6).view(2, 3)
CLOSE = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}


def _model(vocab: int = VOCAB) -> nn.Module:
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": vocab, "hidden_size": 8, "pad_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).double()
    nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


MODEL = _model()


def _hidden(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, 8, dtype=torch.float64)


def _way(lazy: bool, model: nn.Module = MODEL) -> Any:
    model.zero_grad()
    return fastrlhf.lazy_logits(model) if lazy else nullcontext()


def _logprobs(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, IDS[..., None]).squeeze(-1)


def _form(x: Tensor) -> Any:
    strides = [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, x.numel() < 2 or strides


def _assert_same(found: Any, plain: Any, of: str) -> None:
    if not isinstance(found, Tensor) or not isinstance(plain, Tensor):
        assert found == plain, of
        return
    assert _form(found) == _form(plain), of
    assert found.is_contiguous() == plain.is_contiguous(), of
    assert torch.allclose(found.double(), plain.double(), **CLOSE), of


# Random programs


def _total(values: list[tuple[str, Tensor | str]], chosen: list[bool]) -> Tensor:
    """A loss of some of what a program returned; what is not finite counts as zero."""
    total = torch.zeros((), dtype=torch.float64, requires_grad=True) * 0
    for n, ((_, x), is_chosen) in enumerate(zip(values, chosen, strict=True)):
        if is_chosen and isinstance(x, Tensor) and x.requires_grad:
            torch.manual_seed(n)
            weights = torch.randn(x.shape, dtype=torch.float64)
            total = total + (x.double().nan_to_num(0, 0, 0) * weights).sum()
    return total


def _gradients(total: Tensor, hidden: Tensor) -> list[Any]:
    """Gradients, zero where there are none; nothing where PyTorch refuses, since something that it
    has kept was written into.
    """
    inputs = [hidden, MODEL.lm_head.weight]
    try:
        found = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "is a view" in str(error)
        return []
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _outcome(
    program: list[Step], shape: list[int], lazy: bool, first: list[bool] | None = None
) -> Any:
    """What a program returns; the gradients of a loss of what is fused of that; and of one of all,
    for which the logits are built.
    """
    with _way(lazy):
        hidden = _hidden(*shape).requires_grad_()
        logits = MODEL.lm_head(hidden)
        values = run(program, logits)
        if first is None:  # what is no tensor over the vocabulary any more
            first = [type(x) is Tensor for _, x in values]
        fused = _gradients(_total(values, first), hidden)
        everything = _gradients(_total(values, [True] * len(values)), hidden)
        needs = [isinstance(x, Tensor) and x.requires_grad for _, x in values]
        read = [x.detach() + 0 if isinstance(x, Tensor) else x for _, x in [*values, ("", logits)]]
        forms = [_form(x) for _, x in values if isinstance(x, Tensor)]
    return first, (read, needs, forms), fused, everything


def _assert_as_plain(program: list[Step], shape: list[int]) -> None:
    refused = None
    try:
        first, values, *gradients = _outcome(program, shape, True)
    except RuntimeError as error:  # such as of a view that PyTorch lets nobody write into
        first, refused = [False] * 1000, error
    try:
        _, plain_values, *plain = _outcome(program, shape, False, first)
    except (RuntimeError, ValueError) as error:
        assert (
            refused is None or str(refused)[:30] == str(error)[:30] or isinstance(error, ValueError)
        )
        return
    assert refused is None, refused
    assert values[1:] == plain_values[1:]
    for n, (a, b) in enumerate(zip(values[0], plain_values[0], strict=True)):
        _assert_same(a, b, f"result {n}")
    for some, of_plain in zip(gradients, plain, strict=True):
        if of_plain:  # else plain logits have none
            for a, b in zip(some, of_plain, strict=True):
                assert torch.allclose(a, b, **CLOSE), "gradient"


_PRECISE = [x for x in OPERATIONS if x not in ("float", "F.log_softmax", "to")]
_FUSED = [x for x in (*VIEWS, *MAPS, *ENDS) if x in _PRECISE]


def _programs(names: list[str], size: int) -> Any:
    numbers = st.integers(0, 7)
    of = st.sampled_from([0, 0, 0, 1, 2])
    step = st.builds(Step, st.sampled_from(names), of, numbers, numbers)
    return st.lists(step, min_size=1, max_size=size)


_SHAPES = st.sampled_from([[2, 3], [3], [1, 2], [2, 1, 2]])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(program=_programs(_FUSED, 5), shape=_SHAPES)
def test_programs_of_known_functions(program, shape) -> None:
    _assert_as_plain(program, shape)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(program=_programs([*_PRECISE, *WRITES], 6), shape=_SHAPES)
def test_programs_of_all_functions_and_writes(program, shape) -> None:
    _assert_as_plain(program, shape)


def _low_precision_programs() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "log-probs": lambda z: -_logprobs(z).mean(),
        "log-probs in fp32": lambda z: -_logprobs(z.float() / 0.7).mean(),
        "cross-entropy": lambda z: F.cross_entropy(z.view(-1, VOCAB), IDS.view(-1)),
        "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
        "sums": lambda z: (z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)).mean(),
        "built": lambda z: _logprobs(z.div_(2).masked_fill_(z > 0.5, -1.0)).mean(),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _low_precision_programs())
def test_low_precision(name, dtype, autocast) -> None:
    """As near to fp64 as the plain loop, with values of the same dtype."""
    program, model = _low_precision_programs()[name], _model()

    def outcome(dtype: torch.dtype, lazy: bool, autocast: bool) -> list[Tensor]:
        with _way(lazy, model.to(dtype)), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = _hidden(2, 3).bfloat16().to(dtype).requires_grad_()
            loss = program(model.lm_head(hidden))
        return [loss, *torch.autograd.grad(loss, [hidden, model.lm_head.weight])]

    model.to(torch.bfloat16)  # the same weights for all
    exact = outcome(torch.float64, False, False)
    plain, found = (outcome(dtype, lazy, autocast) for lazy in (False, True))
    rounding = torch.bfloat16 if autocast else dtype
    for a, b, c in zip(found, plain, exact, strict=True):
        assert a.dtype is b.dtype
        error, of_plain = (float((x.double() - c).detach().norm()) for x in (a, b))
        assert error <= budget(of_plain, rounding, float(c.detach().norm()))


# Who looks at gradients on their way

_USES: dict[str, Callable[[Tensor], Tensor]] = {
    "fused": lambda x: x.logsumexp(-1).pow(2).sum(),
    "built": lambda x: x.sigmoid().pow(2).sum(),
    "both": lambda x: x.logsumexp(-1).pow(2).sum() + x.sigmoid().pow(2).sum(),
    "built first": lambda x: x.sigmoid().pow(2).sum() + x.logsumexp(-1).pow(2).sum(),
    "divided in place": lambda x: x.div_(2).logsumexp(-1).pow(2).sum(),
    "divided in place, built": lambda x: x.div_(2).cos().sum(),
    "a copy written into": lambda x: _USES["fused"](x) + x.clone().masked_fill_(x > 0, -1).sum(),
    "written into": lambda x: x.sum() + x.masked_fill_(x > 0, -1.0).cos().sum(),
    "a copy": lambda x: x.clone().logsumexp(-1).pow(2).sum() + x.clone().cos().sum(),
}
_OF_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z,
    "doubled": lambda z: z * 2,
    "a view": lambda z: z[:, 1:],
    "log-probs": lambda z: z.log_softmax(-1),
}


def _clip(x: Tensor, seen: list[Any]) -> None:
    x.register_hook(lambda g: g.clamp(-0.1, 0.1))


def _record(x: Tensor, seen: list[Any]) -> None:
    x.register_hook(lambda g: seen.append(g + 0))


def _retain(x: Tensor, seen: list[Any]) -> None:
    x.retain_grad()
    seen.append(lambda: x.grad)


def _is_clear(error: str) -> bool:
    return error.startswith("lazy_logits: ")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("watch", [_clip, _record, _retain])
@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("of", _OF_LOGITS)
def test_hooks_see_the_whole_gradient(of, use, watch, late) -> None:
    """Or there is an error: a hook that comes late, or on a view that is written into."""

    def outcome(lazy: bool) -> list[Tensor] | str:
        with _way(lazy):
            hidden, seen = _hidden(2, 3).requires_grad_(), list[Any]()
            logits = MODEL.lm_head(hidden)
            x = _OF_LOGITS[of](logits)
            try:
                if not late:
                    watch(x, seen)
                loss = _USES[use](x) + logits.logsumexp(-1).sum()
                if late:
                    watch(x, seen)
                loss.backward()
            except RuntimeError as error:
                return str(error)
        seen = [x() if callable(x) else x for x in seen]
        return [hidden.grad, MODEL.lm_head.weight.grad, *seen]

    plain, found = outcome(False), outcome(True)
    if isinstance(plain, str):
        return
    if isinstance(found, str):
        assert _is_clear(found), found
        assert late or (of == "a view" and "in" in use)
    else:
        assert len(found) == len(plain)
        for a, b in zip(found, plain, strict=True):
            assert torch.allclose(a, b, **CLOSE)


_TWO_WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "probs": lambda z, x: (x.softmax(-1) * z).sum(-1) - z.logsumexp(-1),
    "logits": lambda z, x: (z.softmax(-1) * x).sum(-1),
    "both": lambda z, x: (x.softmax(-1) * x).sum(-1),
    "entropy": lambda z, x: (z.softmax(-1) * x.log_softmax(-1)).sum(-1),
    "divergence": lambda z, x: (
        z.softmax(-1) * (x.log_softmax(-1) - (z * 2).detach().log_softmax(-1))
    ).sum(-1),
}


@pytest.mark.parametrize("watch", [_clip, _record, _retain, "leaf"])
@pytest.mark.parametrize("use", _TWO_WAYS)
def test_gradients_that_come_by_different_ways(use, watch) -> None:
    """Of a product of two tensors, one of which is watched, or ends in a leaf."""

    def outcome(lazy: bool) -> list[Tensor]:
        with _way(lazy):
            hidden, seen = _hidden(2, 3).requires_grad_(), list[Any]()
            logits = MODEL.lm_head(hidden)
            if watch == "leaf":
                x = logits.detach().requires_grad_()
                seen.append(lambda: x.grad)
            else:
                x = logits[:]
                watch(x, seen)
            loss = _TWO_WAYS[use](logits, x).pow(2).sum() + logits.logsumexp(-1).sum()
            loss.backward()
            seen = [x() if callable(x) else x for x in seen]
            return [loss.detach(), hidden.grad, MODEL.lm_head.weight.grad, *seen]

    for a, b in zip(outcome(True), outcome(False), strict=True):
        assert torch.allclose(a, b, **CLOSE)


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("of", _OF_LOGITS)
def test_gradients_with_respect_to_what_is_lazy(of, use) -> None:
    def outcome(lazy: bool) -> Any:
        with _way(lazy):
            logits = MODEL.lm_head(_hidden(2, 3))
            x = _OF_LOGITS[of](logits)
            try:
                loss = _USES[use](x) + logits.logsumexp(-1).sum()
                return torch.autograd.grad(loss, [x])[0]
            except RuntimeError:
                return None

    plain, found = outcome(False), outcome(True)
    if plain is not None:
        assert torch.allclose(found, plain, **CLOSE)


# Functions of others


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class _Straight(torch.autograd.Function):
    """A straight-through estimator: its gradient is not that of what it computes."""

    @staticmethod
    def forward(ctx, x):
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def _checkpointed(function: Callable[[Tensor], Tensor], reentrant: bool) -> Any:
    return lambda x: checkpoint(function, x, use_reentrant=reentrant)


_OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "passed": _Passed.apply, "copied": _Copied.apply, "straight": _Straight.apply,
    "square": _Square.apply, "in place": _InPlace.apply,
    **{
        f"checkpoint of {name}, {reentrant}": _checkpointed(function, reentrant)
        for reentrant in (False, True)
        for name, function in {
            "sigmoid": lambda x: x.sigmoid(), "log_softmax": lambda x: x.log_softmax(-1) * 1.0,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("use", [x for x in _USES if x != "written into"])
@pytest.mark.parametrize("other", _OTHERS)
@pytest.mark.parametrize("of", _OF_LOGITS)
def test_functions_of_others(of, other, use) -> None:
    def outcome(lazy: bool) -> Any:
        with _way(lazy):
            hidden = _hidden(2, 3).requires_grad_()
            logits = MODEL.lm_head(hidden)
            try:
                x = _OTHERS[other](_OF_LOGITS[of](logits))
                loss = _USES[use](x) + logits.logsumexp(-1).sum()
                loss.backward()
            except RuntimeError as error:
                return str(error)
        return loss.detach(), hidden.grad, MODEL.lm_head.weight.grad

    plain, found = outcome(False), outcome(True)
    if isinstance(found, str) and not isinstance(plain, str):
        assert other == "in place" and _is_clear(found), found
    elif not isinstance(plain, str):
        for a, b in zip(found, plain, strict=True):
            assert torch.allclose(a, b, **CLOSE)


# What a step leaves behind


def _of_leaf(z: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    leaf = z.detach().requires_grad_()
    function(leaf, -1).sum().backward()
    return leaf.grad.sum()


_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda z: F.cross_entropy(z.view(-1, VOCAB), IDS.view(-1)),
    "log-probs": lambda z: _logprobs(z.float()).sum(),
    "entropy": lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(),
    "topk": lambda z: z.topk(2).values.sum() + z.max(-1).values.sum(),
    "kl": lambda z: F.kl_div(z.log_softmax(-1), z.detach().softmax(-1), reduction="sum"),
    "divided in place": lambda z: z.div_(0.7).logsumexp(-1).sum(),
    "a view divided in place": lambda z: z[:, 1:].div_(0.7).logsumexp(-1).sum(),
    "rows": lambda z: torch.stack([x.logsumexp(-1).sum() for x in z]).sum(),
    "a leaf": lambda z: z.logsumexp(-1).sum() + _of_leaf(z, torch.logsumexp),
    "a leaf, built": lambda z: z.logsumexp(-1).sum() + _of_leaf(z, torch.cumsum),
    "built": lambda z: z.sigmoid().sum() + z.float().cos().sum(),
    "written into": lambda z: z.masked_fill_(z > 0, 0.0).logsumexp(-1).sum(),
    "copied, then written into": lambda z: z.float().exp().sum() + z.mul_(-1).logsumexp(-1).sum(),
}


def _watched(z: Tensor) -> Tensor:
    z.retain_grad()
    x = z * 2
    x.register_hook(lambda g: g)
    return x.logsumexp(-1).sum()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("step", [*_STEPS.values(), _watched], ids=[*_STEPS, "watched"])
def test_steps_leave_nothing_behind(step, backward, monkeypatch) -> None:
    """Nothing waits for the garbage collector, or is held by a loss after its backward."""
    made = list[weakref.ref[Any]]()
    init = Source.__init__

    def noting_init(self: Source, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Source, "__init__", noting_init)
    gc.collect()
    gc.disable()
    try:
        with _way(True):
            hidden = _hidden(2, 3).requires_grad_() * 1
            logits = MODEL.lm_head(hidden)
            loss = step(logits)
            made += [weakref.ref(hidden), weakref.ref(logits)]
            if backward:
                loss.backward()
            del hidden, logits
            if not backward:
                assert made[0]() is not None
                del loss
            assert [x() for x in made] == [None] * 3
    finally:
        gc.enable()


# Graphs that are gone through more than once


@pytest.mark.parametrize("use", ["fused", "built", "both"])
def test_backward_twice(use) -> None:
    def outcome(lazy: bool, retain: bool) -> Any:
        with _way(lazy):
            hidden = _hidden(2, 3).requires_grad_()
            loss = _USES[use](MODEL.lm_head(hidden))
            loss.backward(retain_graph=retain)
            loss.backward()
            return hidden.grad

    assert torch.allclose(outcome(True, True), outcome(False, True), **CLOSE)
    for lazy in (False, True):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            outcome(lazy, False)


@pytest.mark.parametrize("use", ["fused", "built", "both", "divided in place, built", "entropy"])
@pytest.mark.parametrize("of", ["hidden", "weight", "logits"])
def test_a_gradient_of_a_gradient(use, of) -> None:
    def outcome(lazy: bool) -> list[Tensor]:
        with _way(lazy):
            hidden = _hidden(2, 3).requires_grad_()
            logits = MODEL.lm_head(hidden)
            loss = {**_USES, **_STEPS}[use](logits)
            x = {"hidden": hidden, "weight": MODEL.lm_head.weight, "logits": logits}[of]
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + gradient.pow(2).sum()).backward()
            return [gradient, hidden.grad, MODEL.lm_head.weight.grad]

    for a, b in zip(outcome(True), outcome(False), strict=True):
        assert torch.allclose(a, b, **CLOSE)


# Modes, and what comes too late


def _of_no_grad(hidden: Tensor) -> Any:
    with torch.no_grad():
        logits = MODEL.lm_head(hidden)
    logits.requires_grad_()
    (_logprobs(logits).pow(2).sum() + logits.logsumexp(-1).sum()).backward()
    logits.cos().sum().backward()
    return logits.grad


def _in_inference_mode(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    with torch.inference_mode():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        mask, temperature = IDS > 2, torch.linspace(0.5, 1, 3, dtype=torch.float64)[:, None]
        divided = logits / temperature
        lse = logits[mask].logsumexp(-1) + divided[mask].logsumexp(-1)
        of_divided = -(divided.softmax(-1) * (logits / temperature).log_softmax(-1)).sum(-1)
        built = logits.sigmoid()
    (_logprobs(logits).sum() + logits.cos().sum()).backward()
    return entropy.clone(), built.clone(), lse.clone(), of_divided.clone()


def _chained_leaf(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    leaf = logits.detach().requires_grad_()
    _logprobs(leaf).pow(2).sum().backward()
    leaf.logsumexp(-1).sum().backward()
    leaf.grad.mul_(0.5)
    leaf.sum().backward()
    logits.backward(leaf.grad)
    return leaf.grad


def _inputs_of_backward(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    leaf = logits.detach().requires_grad_()
    _logprobs(leaf).pow(2).sum().backward(inputs=[leaf])
    leaf.cos().sum().backward(inputs=[leaf])
    torch.autograd.backward(logits, leaf.grad, inputs=[hidden, MODEL.lm_head.weight])
    return leaf.grad


def _detached_parts(hidden: Tensor) -> Any:
    logp = _logprobs(MODEL.lm_head(hidden))
    loss = (logp.detach().exp() * logp).sum()
    loss.backward()
    return loss.detach()


def _ruled_out(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    logits[..., VOCAB - 1] = -torch.inf
    loss = _logprobs(logits).sum() + logits.logsumexp(-1).sum()
    loss.backward()
    return loss.detach()


def _nan_of_padding(hidden: Tensor) -> Any:
    hidden = torch.where(torch.tensor([[True], [True], [False]]), hidden, torch.nan)
    logits, live = MODEL.lm_head(hidden), torch.tensor([[True, True, False]] * 2)
    loss = F.cross_entropy(logits.view(-1, VOCAB), IDS.masked_fill(~live, -100).view(-1))
    loss = loss + logits[live].logsumexp(-1).sum()
    loss.backward()
    return loss.detach()


def _nothing_left(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)[:0].view(-1, VOCAB)
    return logits.logsumexp(-1), logits.softmax(-1), logits.argmax(-1), MODEL.lm_head(hidden[:0])


def _all_ignored(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden).view(-1, VOCAB)
    loss = F.cross_entropy(logits, torch.full((6,), -100), reduction="sum") / 0
    loss.backward()
    return loss.detach()


def _kl_of_two_temperatures(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    sharp, flat = logits / 0.5, logits.detach() * 0.5
    loss = F.kl_div(sharp.log_softmax(-1), flat.log_softmax(-1), reduction="sum", log_target=True)
    loss.backward()
    return loss.detach()


def _two_calls(hidden: Tensor) -> Any:
    a, b = MODEL.lm_head(hidden), MODEL.lm_head(hidden * 2)
    loss = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()
    loss = loss + F.kl_div(a.log_softmax(-1), b.softmax(-1).detach(), reduction="batchmean")
    (loss + torch.cat([a, b]).sigmoid().sum()).backward()
    return loss.detach()


def _checkpointed_call(hidden: Tensor) -> Any:
    for reentrant in (False, True):
        loss = _checkpointed(lambda x: _logprobs(MODEL.lm_head(x)).sum(), reentrant)(hidden)
        (loss + checkpoint(MODEL.lm_head, hidden, use_reentrant=reentrant).cos().sum()).backward()
    return loss.detach()


def _in_threads(hidden: Tensor) -> Any:
    found: list[Any] = [None] * 3

    def work(n: int) -> None:
        x = (hidden.detach() * (n + 1)).requires_grad_()
        logits = MODEL.lm_head(x)
        found[n] = torch.autograd.grad(_logprobs(logits).sum() + logits.cos().sum(), x)[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _ignored_then_statistics(hidden: Tensor) -> Any:
    logits, labels = MODEL.lm_head(hidden), IDS.masked_fill(IDS % 3 == 1, -100)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    found = losses, logits.logsumexp(-1), entropy
    sum(x.pow(2).sum() for x in found).backward()
    return found


def _rows_with_ignored(hidden: Tensor) -> Any:
    labels = IDS.view(3, 2).masked_fill(IDS.view(3, 2) % 3 == 1, -100)
    rows = MODEL.lm_head(hidden).view(3, 2, VOCAB)
    found = [F.cross_entropy(x, y, reduction="none") for x, y in zip(rows, labels, strict=True)]
    torch.cat(found).pow(2).sum().backward()
    return found


def _ids_written_later(hidden: Tensor) -> Any:
    logits, ids = MODEL.lm_head(hidden), IDS.clone()
    picked = logits.log_softmax(-1).gather(-1, ids[..., None]).detach()
    ids.zero_()
    lse = logits.logsumexp(-1)
    lse.pow(2).sum().backward()
    return picked, lse


def _another_lse(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden.view(3, 2, 8)[:2])
    ids = IDS[:, :2, None]
    found = (logits - logits.logsumexp(-1).T[..., None]).gather(-1, ids)
    lse = logits.logsumexp(-1, keepdim=True)
    lse.register_hook(lambda gradient: gradient * 2)
    (found + (logits - lse).gather(-1, ids)).pow(2).sum().backward()
    return found


def _given_otherwise(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    named = logits.softmax(axis=-1).gather(-1, IDS[..., None])
    named.sum().backward()
    out, at = logits.new_empty(2, 3), IDS.clone()
    with torch.no_grad():
        torch.gather(logits, -1, IDS[..., None], out=(picked := logits.new_empty(2, 3, 1)))
        torch.max(logits, -1, out=(out, at))
        torch.softmax(logits, -1, out=(probs := logits.new_empty(2, 3, VOCAB)))
    for wrong in (lambda: logits.log_softmax(-1).sum(4), lambda: logits.select(-4, 0)):
        with pytest.raises(IndexError, match="Dimension out of range"):
            wrong()
    return named, out, at, picked, probs


def _words_ruled_out(hidden: Tensor) -> Any:
    offset = torch.zeros(VOCAB, dtype=torch.float64).index_fill(0, torch.tensor([2]), -torch.inf)
    logits = MODEL.lm_head(hidden) + offset
    never = logits.log_softmax(-1).gather(-1, torch.full((2, 3, 1), 2)).exp().detach()
    lse = logits.logsumexp(-1)
    lse.pow(2).sum().backward()
    known = logits.detach()
    entropy = (known.softmax(-1) * known.log_softmax(-1)).sum(-1)
    other = (known * 2).log_softmax(-1)
    divergence = F.kl_div(other, known.softmax(-1), reduction="none").sum(-1)
    return never, lse, entropy, divergence


@pytest.mark.parametrize(
    "program",
    [
        _of_no_grad, _in_inference_mode, _chained_leaf, _inputs_of_backward, _detached_parts,
        _ruled_out,
        _nan_of_padding, _nothing_left, _all_ignored, _kl_of_two_temperatures, _two_calls,
        _checkpointed_call, _in_threads, _ignored_then_statistics, _rows_with_ignored,
        _ids_written_later, _another_lse, _given_otherwise, _words_ruled_out,
    ],
)  # fmt: skip
def test_what_is_as_plain(program) -> None:
    def outcome(lazy: bool) -> list[Any]:
        with _way(lazy):
            hidden = _hidden(2, 3).requires_grad_()
            found = program(hidden)
        found = [found] if isinstance(found, Tensor) else [*found]
        return [x + 0 for x in found] + [hidden.grad, MODEL.lm_head.weight.grad]

    for a, b in zip(outcome(True), outcome(False), strict=True):
        _assert_same(a, b, program.__name__)


def test_a_vocabulary_of_one_word() -> None:
    model = _model(vocab=1)
    hidden = _hidden(2, 3)
    plain = model.lm_head(hidden)
    with _way(True, model):
        logits = model.lm_head(hidden)
        assert torch.allclose(logits.logsumexp(-1), plain.logsumexp(-1), **CLOSE)
        assert torch.equal(logits.log_softmax(-1).gather(-1, IDS[..., None] * 0), plain * 0)
        assert torch.equal(logits.squeeze(-1), plain.squeeze(-1))
        assert torch.equal(logits.expand(2, 3, 4), plain.expand(2, 3, 4))


def test_logits_are_used_before_the_weight_changes() -> None:
    model = _model()
    with _way(True, model):
        logits = model.lm_head(_hidden(2, 3).requires_grad_())
        _logprobs(logits).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        for late in (lambda: logits.argmax(-1), lambda: logits.sigmoid()):
            with pytest.raises(RuntimeError, match="by a step of the optimizer"):
                late()


def test_enabled_once_is_enabled() -> None:
    """Twice, nested, or disabled between; and logits outlive it."""
    hidden = _hidden(2, 3)
    plain = MODEL.lm_head(hidden)
    own = type(MODEL.lm_head)
    with _way(True):
        fastrlhf.enable_lazy_logits(MODEL)
        with _way(True):
            logits = MODEL.lm_head(hidden)
        assert type(MODEL.lm_head(hidden)) is not Tensor
    assert type(MODEL.lm_head) is own
    assert type(MODEL.lm_head(hidden)) is Tensor
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    assert torch.equal(logits.sigmoid(), plain.sigmoid())


def test_a_word_of_log_probs_is_not_written_into() -> None:
    """It is no view of what was not computed."""
    with _way(True):
        for late in (lambda x: x.argmax(-1), lambda x: x.sigmoid(), lambda x: x[:, 1:].mul_(2)):
            logp = MODEL.lm_head(_hidden(2, 3)).log_softmax(-1)
            logp[..., 2].detach().mul_(2)
            with pytest.raises(RuntimeError, match="is written into, which the other would see"):
                late(logp)
        logits = MODEL.lm_head(_hidden(2, 3))
        logp, word = logits.log_softmax(-1), logits.log_softmax(-1)[..., 2]
        assert torch.equal(logp[..., 2], word)
        held = logp[..., 3]
        with pytest.raises(RuntimeError, match="is written into, which the other would see"):
            logp.mul_(2)
        assert torch.equal(held, logp[..., 3])
