"""The Fisher information of a policy's parameters times a vector; the matrix F is never built.

F v = Jᵀ w takes three steps: the tangent u = J v of the logits; what the Fisher information of the
softmax makes of it, w = p⊙(u - pᵀu) for each token; and one backward. With a head, the tangent and
the gradient of hidden states take the place of u and w, and no logits are built.

J v comes from forward-mode differentiation, which costs one forward more, or, where an operation of
the model has no forward-mode derivative, from two backwards. Of the backends of
scaled_dot_product_attention, only "math" supports either way (flash, memory-efficient and cuDNN
attention support neither), so it is chosen here for as long as it is needed. A model has to use
that function, or plain operations (attn_implementation "sdpa" or "eager").

Dims: T tokens, H hidden, V vocabulary, D parameters.
"""

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastrlhf.hf import LMHead
from fastrlhf.ops import linear_softmax_fisher_product, softmax_fisher_product
from fastrlhf.ops.checks import (
    check_at_least,
    check_finite,
    check_floating,
    check_one_of,
    check_shape,
)
from fastrlhf.ops.ranks import Group

from .parameters import wide
from .policy import Policy, PolicyOnBatch, differentiable_attention

MODES = ("auto", "forward", "double-vjp")


def fisher_vector_product(
    policy: Policy,
    params: Sequence[Tensor],
    vector: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    damping: float = 0.0,
    head: LMHead | None = None,
    mode: str = "auto",
    group: Group | None = None,
) -> Tensor:
    """Multiply the Fisher information of a policy's parameters, a mean over tokens, by a vector.

    That matrix is the Hessian of the mean KL(π_old‖π), and of KL(π‖π_old), where π is π_old.

    Eager equivalent, with J the (tokens·V, D) Jacobian of the logits and c = mask / mask.sum()::

        u = (J @ vector).view(tokens, V)
        w = c[:, None] * p * (u - (p * u).sum(-1, keepdim=True)) / temperature**2
        product = J.T @ w.flatten() + damping * vector

    Args:
        policy: returns logits (..., V), or with `head` the hidden states (..., H) that enter it.
        params: leaves that require a gradient, whose D elements in order are the parameters.
        vector: (D,) floating.
        mask: (...) bool or 0/1, the tokens that count; None: all.
        temperature: of the softmax.
        damping: λ of F + λI.
        head: `lm_head(model)`, which is not itself among the parameters.
        mode: "forward" (forward-mode differentiation), "double-vjp", or "auto": forward unless the
            model has an operation without it.
        group: torch.distributed group whose ranks have parts of the batch; None: all ranks, where
            torch.distributed is initialised.

    Returns:
        (D,) in the dtype of the vector, fp32 at least; not differentiable.

    Cost: "forward" takes one forward with tangents, which is as much as about two forwards, and one
    backward; "double-vjp" takes a forward and about three backwards. From logits, a few tensors of
    their size are held; with a head, none.

    Raises:
        TypeError, ValueError: shapes that do not fit; an unknown mode.

    Source: 1502.05477 appendix C.

    Example:
        >>> policy = torch.nn.Linear(3, 4)
        >>> states, params = torch.eye(3).unsqueeze(0), list(policy.parameters())
        >>> vector = torch.ones(sum(p.numel() for p in params))
        >>> product = fastrlhf.fisher_vector_product(lambda: policy(states), params, vector)
        >>> product.shape
        torch.Size([16])
    """
    damping = checked_damping(damping)
    check_one_of("mode", mode, MODES)
    on_batch = PolicyOnBatch(policy, params, mask, temperature, head, group)
    check_floating("vector", vector)
    size = on_batch.parameters.size
    check_shape("vector", vector, (size,), "one for each element of params")
    return FisherProduct(on_batch, mode, damping)(wide(vector))


class FisherProduct:
    """The operator v → (F + λI) v on vectors (D,), for the policy as it is at each call.

    It remembers where forward mode failed, so that later products do not try it again.
    """

    def __init__(self, policy: PolicyOnBatch, mode: str, damping: float):
        self.policy, self.mode, self.damping = policy, mode, damping

    def __call__(self, vector: Tensor) -> Tensor:
        tangents = self.policy.parameters.split(vector)
        with differentiable_attention():
            output, tangent = self._output_and_tangent(tangents)
            product = self._pull_back(output, tangent)
        return self.policy.summed(product).to(vector.dtype) + self.damping * vector

    def _output_and_tangent(self, tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The output with its graph, and its tangent for these tangents of the parameters."""
        if self.mode != "double-vjp":
            try:
                return _by_forward_mode(self.policy, tangents)
            except (NotImplementedError, RuntimeError) as error:
                if self.mode == "forward" or not _lacks_forward_mode(error):
                    raise
                self.mode = "double-vjp"
        return _by_double_vjp(self.policy, tangents)

    def _pull_back(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Multiply the Fisher information of each token's logits by its tangent, and pull the
        product back to the parameters: multiply it by Jᵀ, for the Jacobian J of the output.
        """
        policy, plain = self.policy, output.detach()
        options = policy.options() | {"mask": policy.mask}
        if policy.head is None:
            product, row = softmax_fisher_product(plain, tangent, **options)
        else:
            weight = policy.head.weight
            product, row = linear_softmax_fisher_product(plain, weight, tangent, **options)
        product = (product / policy.count(row)).to(output.dtype)
        return policy.parameters.gradient(output, product)


def _by_forward_mode(policy: PolicyOnBatch, tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        with torch.no_grad():
            for p, tangent in zip(policy.parameters.tensors, tangents, strict=True):
                # The leaf itself takes the tangent, wherever the policy finds it.
                p.copy_(forward_ad.make_dual(p.detach().clone(), tangent))
        with torch.enable_grad():
            output, moved = forward_ad.unpack_dual(policy.output())
        if moved is None:
            raise ValueError("params: expected parameters that the policy's output depends on")
        # The dual level ends before the backward, so that the backward does not carry tangents on.
        return output, moved.detach().clone()


def _by_double_vjp(policy: PolicyOnBatch, tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        output = policy.output()
        # J is the derivative of Jᵀw with respect to w.
        w = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(
            output, policy.parameters.tensors, w, create_graph=True, allow_unused=True
        )
        used = [(x, t) for x, t in zip(pulled, tangents, strict=True) if x is not None]
        if not used:
            raise ValueError("params: expected parameters that the policy's output depends on")
        outputs, upstream = zip(*used, strict=True)
        (moved,) = torch.autograd.grad(outputs, w, upstream, retain_graph=True)
    return output, moved


def _lacks_forward_mode(error: Exception) -> bool:
    """Whether an error says that an operation has no forward-mode derivative."""
    text = str(error)
    return isinstance(error, NotImplementedError) or "forward AD" in text or "jvp" in text


def checked_damping(damping: float) -> float:
    return check_at_least("damping", check_finite("damping", damping), 0)
