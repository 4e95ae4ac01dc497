"""Who looks at the gradients of lazy logits on their way, or asks for them otherwise, sees what is
seen with plain ones: hooks, functions of others, repeated backwards, and what a step leaves behind.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lazy_and_plain import (
    CLOSE,
    IDS,
    MODEL,
    VOCAB,
    hidden_states,
    in_checkpoint,
    lazily_or_not,
    logprobs_of_ids,
)
from torch import Tensor

from fastrlhf.lazy.source import Source

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
        with lazily_or_not(lazy):
            hidden, seen = hidden_states(2, 3).requires_grad_(), list[Any]()
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
        with lazily_or_not(lazy):
            hidden, seen = hidden_states(2, 3).requires_grad_(), list[Any]()
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
        with lazily_or_not(lazy):
            logits = MODEL.lm_head(hidden_states(2, 3))
            x = _OF_LOGITS[of](logits)
            try:
                loss = _USES[use](x) + logits.logsumexp(-1).sum()
                return torch.autograd.grad(loss, [x])[0]
            except RuntimeError:
                return None

    plain, found = outcome(False), outcome(True)
    if plain is not None:
        assert torch.allclose(found, plain, **CLOSE)


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


_OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "passed": _Passed.apply, "copied": _Copied.apply, "straight": _Straight.apply,
    "square": _Square.apply, "in place": _InPlace.apply,
    **{
        f"checkpoint of {name}, {reentrant}": in_checkpoint(function, reentrant)
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
        with lazily_or_not(lazy):
            hidden = hidden_states(2, 3).requires_grad_()
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


def _of_leaf(z: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    leaf = z.detach().requires_grad_()
    function(leaf, -1).sum().backward()
    return leaf.grad.sum()


_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda z: F.cross_entropy(z.view(-1, VOCAB), IDS.view(-1)),
    "log-probs": lambda z: logprobs_of_ids(z.float()).sum(),
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
        with lazily_or_not(True):
            hidden = hidden_states(2, 3).requires_grad_() * 1
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


@pytest.mark.parametrize("use", ["fused", "built", "both"])
def test_backward_twice(use) -> None:
    def outcome(lazy: bool, retain: bool) -> Any:
        with lazily_or_not(lazy):
            hidden = hidden_states(2, 3).requires_grad_()
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
        with lazily_or_not(lazy):
            hidden = hidden_states(2, 3).requires_grad_()
            logits = MODEL.lm_head(hidden)
            loss = {**_USES, **_STEPS}[use](logits)
            x = {"hidden": hidden, "weight": MODEL.lm_head.weight, "logits": logits}[of]
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + gradient.pow(2).sum()).backward()
            return [gradient, hidden.grad, MODEL.lm_head.weight.grad]

    for a, b in zip(outcome(True), outcome(False), strict=True):
        assert torch.allclose(a, b, **CLOSE)
