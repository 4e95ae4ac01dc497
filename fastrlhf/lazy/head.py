"""Models whose logits are not computed until somebody asks for them.

The class of the head's module is replaced by one of the same name, whose forward returns lazy
logits; the rest of the model runs as it is, and what it does to its logits (a scale, a softcap, a
loss of labels) is done to lazy ones. Copies of a model, and pickled ones, have the head's own class
again. The replicas of DataParallel have the replaced class, but make plain logits as ever.
"""

import copyreg
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastrlhf.hf.head_check import weight_is_used
from fastrlhf.hf.head_parts import (
    HeadParts,
    NotWholeError,
    base_model,
    check_weights,
    gathers_its_parts,
    head_module,
    head_parts,
    is_of,
    parts_within_call,
)
from fastrlhf.hf.measured import state_of
from fastrlhf.ops.backend import check_impl, outside_of_graphs, under_transform
from fastrlhf.ops.sharded import is_dtensor

from .source import Source
from .tensor import LazyTensor, logits_of

_logger = logging.getLogger(__name__)

_CALLS_BETWEEN_CHECKS = 64
_COMPARED_TOKENS = 4
_TENSOR_PARALLEL = "the head is tensor parallel"


@dataclass
class _Enabled:
    """A head that makes lazy logits."""

    base: ref[Any]
    above: list[ref[nn.Module]]  # the modules that it is part of
    impl: str
    calls: int = 0
    state: Any = None  # the head's state when it was last compared with its weight
    said: set[str] = field(default_factory=set)


_enabled: WeakKeyDictionary[nn.Module, _Enabled] = WeakKeyDictionary()


def enable_lazy_logits(model: nn.Module, *, impl: str = "auto") -> None:
    """Let a model return logits that are not computed until they are needed, and mostly never.

    Eager equivalent: the loop itself. `model(...).logits` is a tensor of the same shape, dtype and
    device as without. Functions of PyTorch that take few numbers of it for each token
    (cross-entropy, log-softmax and gather, log-sum-exp, entropy, argmax, ...) are computed from the
    hidden states, without building logits, forward and backward. Any other function builds them,
    once, and gives what it would have given. `lazy_report` tells which functions built them.

    Args:
        model: a causal language model of transformers, wrapped or not, whose head `lm_head` knows;
            or an encoder or encoder-decoder with such a head.
        impl: as in `token_stats`.

    Results are those of plain logits to rounding: log-probs and sums are computed in fp32 of logits
    that are not rounded to the model's dtype, and rounded to the dtype that the plain loop would
    have. Built logits are the model's own, bit for bit (except where a LoRA adapter of the head has
    a dropout, or FSDP2 shards the head).

    Hooks and wrappers pass the gradient with respect to the logits on as a tensor that stands for
    it; code that reads its numbers gets the plain gradient, for which the logits are built.

    Logits have to be used before the head's weight changes: to use them after a step of the
    optimizer is a RuntimeError. A head that is tensor parallel, or whose weight FSDP1, ZeRO-3 or
    accelerate's offloading takes away after its call, makes plain logits as ever, and the log says
    so once. Where FSDP2 shards the head, a copy of its weight is held as long as its logits are. A
    single position for each sequence, as in generation, is computed at once. A second call changes
    nothing.

    Raises:
        TypeError: the model has no head that is known; it is left as it was.
        ValueError: an impl that is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> fastrlhf.enable_lazy_logits(model)
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> logits = model(ids).logits  # not computed
        >>> loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])  # nor here
        >>> loss.backward()
        >>> fastrlhf.disable_lazy_logits(model)
    """
    base = base_model(model)
    module = head_module(base)
    check_weights(module, type(base).__name__)
    check_impl(impl)
    with suppress(NotWholeError):  # the weight may be whole only during the head's own call
        head_parts(module)
    if module not in _enabled:
        _enabled[module] = _Enabled(ref(base), _modules_above(model, module), impl)
        _put_in_place(module)


def disable_lazy_logits(model: nn.Module) -> None:
    """Take `enable_lazy_logits` back. Logits that were returned before stay what they are.

    Of a model that was not enabled, nothing is changed.

    Raises:
        TypeError: as `enable_lazy_logits`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> fastrlhf.enable_lazy_logits(model)
        >>> fastrlhf.disable_lazy_logits(model)
        >>> type(model(torch.tensor([[3, 1]])).logits)
        <class 'torch.Tensor'>
    """
    _disable(head_module(base_model(model)))


def _disable(module: nn.Module) -> None:
    if _enabled.pop(module, None) is not None:
        _take_away(module)


@contextmanager
def lazy_logits(model: nn.Module, *, impl: str = "auto") -> Iterator[None]:
    """Have `enable_lazy_logits` within a `with` statement.

    ::

        with fastrlhf.lazy_logits(model):
            trainer.train()

    Arguments, eager equivalent and errors are those of `enable_lazy_logits`. A model that was
    enabled before stays so afterwards.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> with fastrlhf.lazy_logits(model):  # around a loop that nobody edits
        ...     model(ids, labels=ids).loss.backward()
    """
    module = head_module(base_model(model))
    was_enabled = module in _enabled
    enable_lazy_logits(model, impl=impl)
    try:
        yield
    finally:
        if not was_enabled:
            _disable(module)  # not the head of now, since peft may have put adapters around it


def _modules_above(model: nn.Module, module: nn.Module) -> list[ref[nn.Module]]:
    return [ref(x) for x in model.modules() if any(part is module for part in x.modules())]


def _put_in_place(module: nn.Module) -> None:
    name = _own_forward_attribute(module)
    if name is None:
        cls: Any = type(module)
        module.__class__ = _lazy_class(cls)
    else:  # the module itself has a forward, which hides its class's
        vars(module)[name] = _LazyForward(module, vars(module)[name])


def _take_away(module: nn.Module) -> None:
    name = _own_forward_attribute(module)
    if name is not None and isinstance(vars(module)[name], _LazyForward):
        vars(module)[name] = vars(module)[name].fastrlhf_own
    own = vars(type(module)).get("_fastrlhf_own_class")
    if own is not None:  # if it is None, a wrapper (FSDP2) has put its own class above
        module.__class__ = own


def _own_forward_attribute(module: nn.Module) -> str | None:
    """The attribute that holds a forward of the module itself, if it has one. Where accelerate has
    put a forward that moves weights around the module's own, that is `_old_forward`.
    """
    names = ("_old_forward", "forward")
    return next((name for name in names if name in vars(module)), None)


class _LazyForward:
    """A forward that returns lazy logits in place of those that a module's own would compute."""

    def __init__(self, module: nn.Module, own: Callable[..., Any]):
        self.module, self.fastrlhf_own = module, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _forward(self.module, self.fastrlhf_own, *args, **kwargs)


class _LazyForwards:
    """A descriptor for the forward of a class: of the class, it is the own one; of its modules, the
    lazy one. Like any method, it gives way to a forward that somebody puts into a module itself.
    """

    def __init__(self, own: Callable[..., Any]):
        self.own = own

    def __get__(self, module: nn.Module | None, cls: Any = None) -> Callable[..., Any]:
        if module is None:
            return self.own
        return _LazyForward(module, functools.partial(self.own, module))


@functools.cache
def _lazy_class(cls: Any) -> Any:
    class LazyHead(cls):
        _fastrlhf_own_class = cls
        forward = _LazyForwards(cls.forward)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # Pickled as an object of the own class, whose name this class has. The usual way,
            # __newobj__, takes no class but the object's.
            _, _, *state = super().__reduce_ex__(protocol)
            return (copyreg._reconstructor, (cls, object, None), *state)  # type: ignore[attr-defined]

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(LazyHead, name, getattr(cls, name))
    return LazyHead


def _forward(module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    enabled = _enabled.get(module)
    if enabled is None:
        return own(*args, **kwargs)
    return outside_of_graphs(_lazy_if_possible)(enabled, module, own, *args, **kwargs)


def _lazy_if_possible(
    enabled: _Enabled, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    hidden = args[0] if len(args) == 1 and not kwargs else None
    if is_dtensor(hidden):
        _say(enabled, _TENSOR_PARALLEL)
    if not isinstance(hidden, Tensor) or not _is_plain(hidden) or hidden.shape[-2] < 2:
        return own(*args, **kwargs)
    try:
        parts = parts_within_call(module)
        why = _why_not(enabled, module, own, hidden, parts)
    except RuntimeError as error:
        parts, why = None, str(error)
    if why:
        _say(enabled, why)
        return own(hidden)
    source = Source(
        module, own, hidden, parts, holds_weight=_is_sharded(enabled), impl=enabled.impl
    )
    return logits_of(source, hidden)


def _say(enabled: _Enabled, why: str) -> None:
    """Log once why logits cannot wait."""
    if why not in enabled.said:
        enabled.said.add(why)
        _logger.warning("lazy_logits: the logits are built: %s", why)


def _is_plain(hidden: Tensor) -> bool:
    """Whether these are plain floating-point hidden states of some tokens, in no transform."""
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting() or under_transform()
    known = type(hidden) is Tensor and hidden.is_floating_point() and hidden.ndim >= 2
    return known and not traced and hidden.shape[:-1].numel() > 0


def _why_not(
    enabled: _Enabled, module: nn.Module, own: Callable[..., Tensor], hidden: Tensor,
    parts: HeadParts | None,
) -> str:  # fmt: skip
    """Why logits cannot wait; an empty text if they can."""
    goes = any(map(_weights_go_away, module.modules())) or gathers_its_parts(module)
    offloads = any(getattr(x, "offload", False) for x in _hooks(module))
    if goes or offloads or (parts is None and _is_sharded(enabled)):
        return "the weight of the head is not there after its call"
    if (parts is not None and parts.part is not None) or any(map(is_dtensor, module.parameters())):
        return _TENSOR_PARALLEL
    if parts is None and any(_drops(x) for x in module.modules()):
        return "an adapter of the head that is no LoRA draws a dropout at each call"
    state = state_of(enabled.base(), module, parts)
    due = enabled.state != state or enabled.calls % _CALLS_BETWEEN_CHECKS == 0
    enabled.calls += 1
    if due and parts is not None:
        some = hidden.detach().reshape(-1, hidden.shape[-1])[:_COMPARED_TOKENS]
        if not weight_is_used(module, own, parts, some):
            return "the forward of the head gives other logits than its weight"
    enabled.state = state
    return ""


def _weights_go_away(part: nn.Module) -> bool:
    """Whether a module has its weights during its call only, by DeepSpeed's ZeRO-3, FSDP1, or a
    call with other parameters (torch.func). With the last two, they are tensors that are no
    parameters.
    """
    weights = [getattr(part, name, None) for name in ("weight", "bias", *part._parameters)]
    there = [x for x in weights if isinstance(x, Tensor)]
    return any(hasattr(x, "ds_status") or not isinstance(x, nn.Parameter) for x in there)


def _hooks(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        yield from getattr(hook, "hooks", (hook,))


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def _is_sharded(enabled: _Enabled) -> bool:
    """Whether FSDP2 may take the weight away."""
    above = (x() for x in enabled.above)
    return any(x is not None and is_of(x, "torch.distributed.fsdp", "FSDPModule") for x in above)


__all__ = ["LazyTensor", "disable_lazy_logits", "enable_lazy_logits", "lazy_logits"]
