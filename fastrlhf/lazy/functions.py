"""The functions of PyTorch that are known, and what is called in place of each.

`tensor` looks a function up here. `KNOWN` has those that work without built logits; `OF_FORM` has
those that need no numbers at all. For any other function, the logits are built (see `building`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import endings, losses, maps, views
from .asked_gradients import OF_GRADIENT
from .recipe import Recipe
from .tensor import LazyTensor

# Called with a Recipe and the function's own arguments. It returns what the function would, or
# NotImplemented to have the logits built.
Known = Callable[..., Any]


def _of_logits(known: Known) -> Known:
    """Limit what is known to lazy tensors whose last dimension is the vocabulary."""

    @functools.wraps(known)
    def of(recipe: Recipe, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, LazyTensor) or x.vocab_dim != -1:
            return NotImplemented
        return known(recipe, x, *args, **kwargs)

    return of


signature = functools.cache(inspect.signature)


def _getitem(recipe: Recipe, x: LazyTensor, index: Any) -> Any:
    index = views.with_tensors(index, x)
    result = views.getitem(recipe, x, index)
    return endings.pick(recipe, x, index) if result is NotImplemented else result


def _by_name(names: str, known: Known) -> dict[Any, Known]:
    """The functions and methods of these names."""
    places = (torch, Tensor, F, torch.special)
    functions = {getattr(place, name, None) for name in names.split() for place in places}
    return dict.fromkeys(functions - {None}, known)


def _getter(attribute: str) -> Any:
    return getattr(Tensor, attribute).__get__


# Methods and attributes that only ask for the form of a tensor, or for its place in the graph.
_OF_FORM = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex is_contiguous "
    "stride storage_offset get_device __len__ is_conj is_neg is_inference is_signed "
    "_is_view has_names is_same_size"
)
_ATTRIBUTES_OF_FORM = (
    "shape dtype device ndim layout requires_grad grad_fn is_leaf is_cuda is_cpu is_meta is_xpu "
    "is_mps is_quantized is_sparse is_sparse_csr is_mkldnn is_nested names output_nr _version "
    "itemsize nbytes _backward_hooks retains_grad _base"
)
OF_FORM = {getattr(place, name, None) for name in _OF_FORM.split() for place in (Tensor, torch)}
OF_FORM |= {_getter(name) for name in _ATTRIBUTES_OF_FORM.split() if hasattr(Tensor, name)}
OF_FORM |= {getattr(Tensor, name).__set__ for name in ("_backward_hooks", "requires_grad", "grad")}

KNOWN: dict[Any, Known] = {
    **_by_name("__getitem__", _of_logits(_getitem)),
    **_by_name(
        "view reshape flatten squeeze unsqueeze view_as reshape_as", _of_logits(views.reshape)
    ),
    **_by_name("transpose permute movedim moveaxis swapaxes swapdims", views.transpose),
    **_by_name("split chunk unbind tensor_split split_with_sizes", _of_logits(views.parts)),
    **_by_name("select narrow index_select", _of_logits(views.one_dim)),
    **_by_name("__iter__", _of_logits(views.iterate)),
    **_by_name("expand expand_as", _of_logits(views.expand)),
    **_by_name("broadcast_tensors", views.broadcast),
    **_by_name("contiguous clone", maps.unchanged),
    **_by_name("detach", maps.detach),
    **_by_name("float half bfloat16 double", maps.cast),
    **_by_name("to type", maps.to),
    Tensor.cpu: maps.moved,
    Tensor.cuda: maps.moved,
    **_by_name("neg negative __neg__", maps.negative),
    **_by_name("mul multiply __mul__ __rmul__", maps.multiply),
    **_by_name("div divide true_divide __truediv__", maps.divide),
    **_by_name("div_ divide_ true_divide_ __itruediv__ mul_ multiply_ __imul__", maps.write),
    **_by_name("add __add__ __radd__", maps.add),
    **_by_name("sub subtract __sub__", maps.subtract),
    **_by_name("tanh", maps.tanh),
    **_by_name("log_softmax", maps.log_softmax),
    **_by_name("softmax", maps.softmax),
    **_by_name("log", maps.logarithm),
    **_by_name("exp", maps.exponential),
    **_by_name("clamp clamp_min clip", maps.clamp),
    **_by_name("gather", _of_logits(endings.gather)),
    **_by_name("take_along_dim", _of_logits(endings.take_along_dim)),
    **_by_name("argmax", _of_logits(endings.argmax)),
    **_by_name("max amax", _of_logits(endings.largest)),
    **_by_name("topk", _of_logits(endings.topk)),
    **_by_name("logsumexp", endings.logsumexp),
    **_by_name("sum mean", endings.add_up),
    **_by_name("cross_entropy", losses.cross_entropy),
    **_by_name("nll_loss", losses.nll_loss),
    **_by_name("kl_div", losses.kl_div),
    **OF_GRADIENT,
    _getter("data"): maps.detach,
    _getter("mT"): views.transpose,
}
