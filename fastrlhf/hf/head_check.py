"""Find out whether the forward of a head multiplies by the weight that was read from it.

Asked by `at_head.py` and by `fastrlhf/lazy/head.py`; how a head is stored is known in
`head_parts.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrlhf.ops.backend import under_transform
from fastrlhf.ops.linear_head import Head, QuantizedWeight
from fastrlhf.ops.linear_precision import matmul_dtype
from fastrlhf.ops.ranks import gathered

from .head_parts import HeadParts, evaluating
from .head_scorer import with_adapters
from .tensor_parallel import own_columns


def check_weight(
    module: nn.Module,
    head_forward: Callable[..., Tensor],
    parts: HeadParts,
    hidden: Tensor,
) -> None:
    """Compare on some hidden states (n, H).

    Raises:
        RuntimeError: where they differ; on all ranks, if on one.
    """
    if not weight_is_used(module, head_forward, parts, hidden):
        raise RuntimeError(
            f"model: the forward of its head, a {type(module).__name__}, gives other "
            "logits than its weight, so log-probs would be wrong; use token_stats on the "
            "model's logits"
        )


@torch.no_grad()
def weight_is_used(
    module: nn.Module,
    head_forward: Callable[..., Tensor],
    parts: HeadParts,
    hidden: Tensor,
) -> bool:
    """Compare a head's own forward of some hidden states (n, H) with the products by its weight.

    Nothing of it is kept for backward. A checkpoint around the call counts the tensors that are
    kept, and its second call, in which the head is not compared again, must keep as many.
    """
    if not hidden.shape[0]:
        return True
    hidden = hidden.detach()
    if not under_transform():
        # On a CPU, a 4-bit head whose input needs no gradient packs its weight, and keeps it so.
        hidden.requires_grad_()
    with evaluating(module):  # the dropout of adapters would differ each time
        logits = own_columns(head_forward(hidden.unsqueeze(0))[0], parts.part)
        wide, weights = with_adapters(parts, hidden)
    head = Head(weights, parts.bias, matmul_dtype(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        expected = head.logits(wide.to(head.dtype).to(head.operands))
    weight = parts.weight
    eight_bit = isinstance(weight, QuantizedWeight) and weight.table is None
    half = logits.dtype in (torch.bfloat16, torch.float16)
    # A share of the largest logit of the row. The module of an 8-bit head rounds hidden states.
    tolerance = 0.1 if eight_bit else 2**-5 if half else 1e-3
    # The own forward of a tensor-parallel head may give other columns than this rank has here.
    alike = logits.shape == expected.shape
    same = torch.full((), alike, device=expected.device)
    if alike and expected.numel():  # a rank may have no columns of the vocabulary
        error = (logits.to(expected) - expected).abs().amax(-1)
        # Logits below the smallest normal number of their dtype have fewer digits.
        floor = torch.finfo(logits.dtype).tiny
        same = (error <= tolerance * expected.abs().amax(-1) + floor).all()
    if parts.part is not None:  # all ranks raise if one does, or the others would wait for it
        same = gathered(same.int(), parts.part.group).all()
    return bool(same)
