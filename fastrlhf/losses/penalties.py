"""Estimates of the divergence from a reference policy, token by token.

`policy.py` adds them to a loss, `advantages.py` subtracts them from rewards, and `rejection.py`
compares them with bounds. The kernel of the policy loss has the same formulas as device functions
(`fastrlhf/kernels/policy_loss.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrlhf.losses.arguments import check_like
from fastrlhf.losses.ratios import saturated
from fastrlhf.ops.checks import check_floating, check_one_of
from fastrlhf.reference import accumulation_dtype, expm1_minus


def _with_gradient_of_k2(value: Tensor, x: Tensor) -> Tensor:
    """Return the value, with the gradient of x²/2."""
    return value.detach() + (x.square() - x.detach().square()) / 2


# The estimators by name, as functions of x = ln ref - ln π; see `kl_penalty`. k1, k2 and k3 are
# Schulman's names.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: -x,
    "k1+": lambda x: _with_gradient_of_k2(-x, x),
    "k2": lambda x: x.square() / 2,
    "k3+": lambda x: _with_gradient_of_k2(expm1_minus(saturated(x)), x),
    "k3": lambda x: expm1_minus(saturated(x)),
    "abs": lambda x: x.abs(),
}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate KL(π‖ref) from the log-probs of tokens that π sampled, token by token.

    Eager equivalent, with x = ref_logprobs - logprobs::

        {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - 1 - x, "abs": x.abs()}[estimator]

    and "k1+" and "k3+", which have the value of k1 and k3 and the gradient of k2.

    Args:
        logprobs: (B, T), or any shape, log-probs under the policy, in nats.
        ref_logprobs: the same shape, under the reference.
        estimator: what an average over samples of π estimates, and where a gradient through the
            penalty, as a term of a loss, leads on average:

            ====  ============================  ==================================
            name  expected value                expected gradient
            ====  ============================  ==================================
            k1    KL(π‖ref)                     0: of no use as a loss
            k2    KL(π‖ref), to second order    that of KL(π‖ref)
            k3    KL(π‖ref)                     that of KL(ref‖π)
            abs   the mean of |ln π - ln ref|   that of Σ|π - ref|, the total variation
            k1+   KL(π‖ref)                     that of KL(π‖ref)
            k3+   KL(π‖ref)                     that of KL(π‖ref)
            ====  ============================  ==================================

            (These gradients take the samples as given, as autograd does. In a reward, which no
            gradient goes through, k1 leads to the gradient of KL(π‖ref).)

    Returns:
        (B, T) in nats, fp32 (fp64 for fp64). k3 is accurate where the two policies nearly agree,
        and ends at e^80 (e^700 in fp64), so that it stays finite.

    Differentiable with respect to logprobs and ref_logprobs.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; an unknown estimator.

    Source: Schulman, "Approximating KL divergence" (2020); k3 as a loss in 2402.03300 Eq. 4.

    Example:
        >>> logprobs, ref_logprobs = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
        >>> fastrlhf.kl_penalty(logprobs, ref_logprobs, "k1")
        tensor([ 0.5000, -1.0000])
        >>> fastrlhf.kl_penalty(logprobs, ref_logprobs, "k3")
        tensor([0.1065, 0.7183])
    """
    check_floating("logprobs", logprobs)
    check_floating("ref_logprobs", ref_logprobs)
    check_like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    check_estimator("estimator", estimator)
    dtype = accumulation_dtype(logprobs.dtype)
    return KL_ESTIMATORS[estimator](ref_logprobs.to(dtype) - logprobs.to(dtype))


def check_estimator(name: str, estimator: str) -> None:
    """Raise TypeError or ValueError unless it is the name of an estimator."""
    check_one_of(name, estimator, KL_ESTIMATORS)


def importance_corrected(
    estimator: str, x: Tensor, log_ratio: Tensor, log_product: Tensor
) -> Tensor:
    """Multiply an estimate of x = ln ref - ln π by the ratio r = π/π_old, which the gradient goes
    through too: the expected value over samples of π_old is KL(π‖ref), and for k3 so is the
    gradient its gradient.

    log_product is x + ln r, without a gradient where that is a constant, ln ref - ln π_old.
    """
    ratio = saturated(log_ratio).exp()
    # A token that the policy forbids has the ratio 0, and so no penalty and no gradient.
    forbidden = x == torch.inf
    x, log_product = (torch.where(forbidden, 0.0, y) for y in (x, log_product))
    if estimator != "k3":
        return ratio * KL_ESTIMATORS[estimator](x)
    near = x.abs() < 1
    close = ratio * expm1_minus(torch.where(near, x, 0.0))
    # r·e^x is π_ref/π_old, a constant, and can be large. As a product of r and e^x it would leave
    # its rounding in the gradient, which is -r·x.
    far = saturated(log_product).exp() - ratio * (1 + x)
    return torch.where(near, close, far)
