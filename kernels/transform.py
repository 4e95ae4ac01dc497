"""From the logits that a model gives to the effective ones, which the softmax is of.

z = softcap·tanh(scale·x / softcap) / temperature, or scale·x / temperature without a softcap. The
temperature is a number, or a tensor with one of each token, and is never applied to a tile: kernels
keep the *capped* logits, those before the division, and fold 1 / temperature into the factor that
the exponential takes anyway.

Here are both sides: `transform_options` makes a launcher's arguments of it, and a kernel
makes a `Transform` of these.

Called by the launchers and kernels that read logits. `fastrlhf/ops/transform.py` checks the
arguments before they come here.

Dims: V vocabulary, N rows (tokens).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import LOG2E, tanh


class Transform(NamedTuple):
    """The transform of one row of logits, or of a block of rows, in a kernel.

    A kernel makes it in the very call that takes it: assigned to a name, or returned by a device
    function, HAS_SOFTCAP would become a number of run time, as all constexprs of a tuple do.
    """

    scale: tl.tensor
    softcap: tl.tensor  # of no effect unless HAS_SOFTCAP
    temperature: tl.tensor  # a scalar, or (BLOCK,) of the rows of a block
    rate: tl.tensor  # log2(e) / temperature: what turns capped logits into bits
    HAS_SOFTCAP: tl.constexpr


@triton.jit
def row_temperature(
    row,  # its number, or those of a block of rows
    live,  # which of them have a temperature at all
    token_temperature,  # (N,) or unused
    temperature,
    acc: tl.constexpr,
    PER_TOKEN_TEMPERATURE: tl.constexpr,
):
    """The temperature of a row, or of each of several, and the rate of a `Transform`."""
    if PER_TOKEN_TEMPERATURE:
        row_t = tl.load(token_temperature + row, mask=live, other=1.0).to(acc)
    else:
        row_t = tl.full((), temperature, acc)
    # Not in the return: under the interpreter, only an assignment makes a tensor of a constexpr
    # that is divided.
    rate = LOG2E / row_t
    return row_t, rate


@triton.jit
def capped_logits(x, transform):
    """The effective logits but for the temperature, and their slope with respect to x, which has
    the type of accumulation.
    """
    scale = tl.full((), transform.scale, x.dtype)
    if transform.HAS_SOFTCAP:
        softcap = tl.full((), transform.softcap, x.dtype)
        # Divided once, not at every token.
        saturation, slope = tanh(x * (scale / softcap))
        return softcap * saturation, slope * scale
    else:
        return x * scale, scale


def transform_options(
    temperature: float | torch.Tensor,
    softcap: float | None,
    scale: float,
    placeholder: torch.Tensor,
) -> dict[str, Any]:
    """Kernel arguments of the transform.

    Where the temperature is a number, the kernel is told so by a constexpr, and never follows the
    pointer to those of tokens: any tensor stands in for it.
    """
    per_token = isinstance(temperature, torch.Tensor)
    return {
        "token_temperature": temperature if per_token else placeholder,
        "temperature": 1.0 if per_token else temperature,
        "softcap": 1.0 if softcap is None else softcap,
        "scale": scale,
        "PER_TOKEN_TEMPERATURE": per_token,
        "HAS_SOFTCAP": softcap is not None,
    }
