"""A reference model that follows the policy: TR-DPO.

The loss that the reference is for is `model_dpo_loss` (`model_preference.py`).
"""

import torch
from torch import nn

from fastrlhf.ops.checks import FLOATING_DTYPES, check_between
from fastrlhf.reference import accumulation_dtype


@torch.no_grad()
def update_reference(reference_model: nn.Module, model: nn.Module, alpha: float = 0.6) -> None:
    """Move the parameters of a reference model towards those of the policy, in place.

    Eager equivalent: `reference = alpha * policy + (1 - alpha) * reference`, for each parameter.

    TR-DPO's soft update is this every few steps with alpha below 1; its hard update, every τ steps
    with alpha=1::

        if step % tau == 0:
            update_reference(reference_model, model, alpha=1.0)

    Args:
        reference_model: of the same architecture as model, with parameters of its own.
        model: the policy, without wrappers that rename parameters (DDP's `module`).
        alpha: share of the policy, in [0, 1].

    Computed in fp32 for parameters of fewer bits, and rounded once: keep the reference in fp32
    where alpha times a change is below what its dtype resolves. Buffers stay as they are. A
    parameter goes to the dtype and device of the reference's. Log-probs of the reference that were
    computed before belong to the reference before.

    Raises:
        TypeError: what is no module; a parameter that is not floating, as those of quantised
            layers.
        ValueError: alpha out of range; parameters that differ in name or shape, are shared by both
            models, have no data (meta), or are cut into parts by DeepSpeed's ZeRO-3 (gather both
            models' with `deepspeed.zero.GatheredParameters`). Nothing is written then.

    Source: 2404.09656, section 3.

    Example:
        >>> policy, reference = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> _ = policy.weight.data.fill_(1.0), reference.weight.data.fill_(0.0)
        >>> fastrlhf.update_reference(reference, policy, alpha=0.25)
        >>> reference.weight.item()
        0.25
    """
    for name, module in (("reference_model", reference_model), ("model", model)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected a module, got {type(module).__name__}")
    alpha = check_between("alpha", alpha, 0, 1)
    references = dict(reference_model.named_parameters())
    policies = dict(model.named_parameters())
    _check_names(references, policies)
    for name, parameter in references.items():
        _check_pair(name, parameter, policies[name])
    for name, parameter in references.items():
        dtype = accumulation_dtype(torch.promote_types(parameter.dtype, policies[name].dtype))
        before, policy = parameter.to(dtype), policies[name].to(parameter.device, dtype)
        parameter.copy_(torch.lerp(before, policy, alpha))


def _check_names(references: dict[str, nn.Parameter], policies: dict[str, nn.Parameter]) -> None:
    for name in references:
        if name not in policies:
            raise ValueError(f"model: expected parameter {name!r} of reference_model, got none")
    for name in policies:
        if name not in references:
            raise ValueError(f"reference_model: expected parameter {name!r} of model, got none")


def _check_pair(name: str, reference: nn.Parameter, policy: nn.Parameter) -> None:
    if reference is policy:
        raise ValueError(
            f"reference_model: expected parameters of its own, got {name!r} of model itself"
        )
    for owner, x in (("reference_model", reference), ("model", policy)):
        if x.dtype not in FLOATING_DTYPES:
            raise TypeError(f"{owner}: expected floating parameters, got {name!r} of {x.dtype}")
        if x.is_meta:
            raise ValueError(f"{owner}: expected parameters with data, got {name!r} on meta")
        if hasattr(x, "ds_id") and x.numel() != getattr(x, "ds_numel", x.numel()):
            raise ValueError(
                f"{owner}: expected whole parameters, got a part of {name!r}; call this within "
                "deepspeed.zero.GatheredParameters, which must write back what rank 0 has"
            )
    if reference.shape != policy.shape:
        raise ValueError(
            f"reference_model: expected {name!r} of shape {tuple(policy.shape)}, as model's, got "
            f"{tuple(reference.shape)}"
        )
