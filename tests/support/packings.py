"""The same sequences packed and padded, and the comparison of what functions make of both."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastrlhf as fr
from support.compare import assert_as_accurate

BACKENDS = pytest.mark.parametrize("impl", ["eager", "triton"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize("leading", [(), (1,)], ids=["(N,)", "(1, N)"])

# Empty sequences at both ends and in the middle, two in a row, single tokens, and sequences that
# fill groups of 32 of the tree exactly, nearly, and many times.
LENGTHS = [0, 1, 32, 31, 0, 0, 33, 1, 97, 64, 5, 0]
LENGTH_SETS = {
    "mixed": LENGTHS,
    "one": [7],
    "one token": [1],
    "single tokens": [1] * 40,
    "empty ones alone": [0, 0, 0],
    "none": [],
    "a long one between": [3, 1100, 2],
    "a thousand and 24 exactly": [512, 512],
    "no group": [5, 6],
}


class Packing(NamedTuple):
    """The borders of sequences, and which cells of the padded form (B, T) hold their tokens."""

    cu_seqlens: Tensor
    there: Tensor

    def packed(self, x: Tensor, leading: tuple[int, ...] = ()) -> Tensor:
        """The tokens of a padded tensor, one sequence after the other."""
        return x[self.there].reshape(*leading, -1)

    def random(self, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return (torch.randn(self.there.shape, device=self.there.device) * scale).to(dtype)


def packing(
    lengths: list[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.int64
) -> Packing:
    sizes = torch.tensor(lengths, dtype=torch.int64)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0))).to(dtype)
    there = torch.arange(max(lengths, default=0)) < sizes.unsqueeze(1)
    return Packing(cu_seqlens.to(device), there.to(device))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


class Found(NamedTuple):
    """Values by name, and the gradients of a weighted sum of those that have one."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def found(
    function: Callable[..., dict[str, Tensor]], trained: dict[str, Tensor], seed: int = 3
) -> Found:
    """Call a function of tensors, and go back from values weighted unevenly."""
    leaves = {name: leaf(x) for name, x in trained.items()}
    values = function(**leaves)
    generator = torch.Generator().manual_seed(seed)
    total = None
    for x in values.values():
        if x.requires_grad:
            weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            part = (x * weights.to(x)).sum()
            total = part if total is None else total + part
    if total is not None:
        total.backward()
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return Found({name: x.detach() for name, x in values.items()}, gradients)


def assert_agree(packed: Found, plain: Found, exact: Found, pack: Packing) -> None:
    """Assert that packed values and gradients are as accurate as those of the padded form in the
    same dtype, against those in fp64; gradients of tokens in the shape that went in.
    """
    assert packed.values.keys() == plain.values.keys()
    assert packed.gradients.keys() == plain.gradients.keys()
    for name, value in packed.values.items():
        assert value.dtype == plain.values[name].dtype
        # Losses and metrics are means of terms of about 1, which may cancel.
        size = max(1.0, exact.values[name].abs().item()) if value.ndim == 0 else None
        assert_as_accurate(value, plain.values[name], exact.values[name], size=size, of=name)
    for name, gradient in packed.gradients.items():
        of_plain, of_exact = plain.gradients[name], exact.gradients[name]
        if of_plain.ndim == 2:
            of_plain, of_exact = pack.packed(of_plain), pack.packed(of_exact)
        assert gradient.dtype == of_plain.dtype
        assert_as_accurate(gradient.reshape(-1), of_plain, of_exact, of=f"gradient of {name}")


class Example(NamedTuple):
    """A function of trained tensors and others, each padded, and where it differs when packed."""

    function: Callable[..., dict[str, Tensor]]
    trained: dict[str, Tensor]
    others: dict[str, Any]


def check(example: Example, pack: Packing, dtype: torch.dtype, leading: tuple[int, ...]) -> Found:
    """Assert that an example gives the same packed as padded, and return what that is."""

    def converted(x: Any, to: torch.dtype) -> Any:
        return x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x

    def moved(x: Any) -> Any:
        of_tokens = isinstance(x, Tensor) and x.shape == pack.there.shape
        return pack.packed(x, leading) if of_tokens and x.ndim == 2 else x

    def run(to: torch.dtype, packed: bool) -> Found:
        # Rounded first, so that the oracle sees the same numbers.
        trained, others = (
            {name: converted(converted(x, dtype), to) for name, x in part.items()}
            for part in (example.trained, example.others)
        )
        if packed:
            trained, others = (
                {name: moved(x) for name, x in part.items()} for part in (trained, others)
            )
            others["cu_seqlens"] = pack.cu_seqlens
        result = found(lambda **leaves: example.function(**leaves, **others), trained)
        return result

    result = run(dtype, True)
    for name, gradient in result.gradients.items():
        assert gradient.shape == moved(example.trained[name]).shape
    assert_agree(result, run(dtype, False), run(torch.float64, False), pack)
    return result


def masked(pack: Packing, share: float = 0.7, garbage: float = math.nan) -> Callable[..., Tensor]:
    """Make tensors of tokens with garbage outside of a mask, which is an attribute."""
    mask = pack.there & (torch.rand(pack.there.shape, device=pack.there.device) < share)

    def tokens(scale: float = 1.0) -> Tensor:
        return torch.where(mask, pack.random(scale=scale), garbage)

    tokens.mask = mask  # type: ignore[attr-defined]
    return tokens


def preference(
    pack: Packing, loss_type: str, impl: str, *, ref_per_token: bool = True, **options: Any
) -> Example:
    """dpo_loss of random pairs, sequences that take part in two of them and in none included."""
    sequences = pack.there.shape[0]
    tokens = masked(pack)
    pairs = max(1, 2 * sequences // 3) if sequences else 0
    yw, yl = (
        torch.randint(max(sequences, 1), (pairs,), device=pack.there.device) for _ in range(2)
    )
    ref = tokens(0.3) if ref_per_token else pack.random()[:, :1].sum(1)

    def function(pi: Tensor, ref: Tensor, mask: Tensor, **rest: Any) -> dict[str, Tensor]:
        losses, rewards = fr.dpo_loss(
            pi, ref, yw, yl, 0.3, mask=mask, loss_type=loss_type, label_smoothing=0.1, impl=impl,
            **rest, **options,
        )  # fmt: skip
        return {"losses": losses, "rewards": rewards}

    return Example(function, {"pi": tokens(0.3), "ref": ref}, {"mask": tokens.mask})


def policy(pack: Packing, *, per_sequence: bool = True, **options: Any) -> Example:
    """policy_loss with everything that it takes, clipped tokens on either side."""
    tokens, sequences = masked(pack), pack.there.shape[0]
    device = pack.there.device
    advantages = torch.randn(sequences, device=device) if per_sequence else tokens()
    weights = torch.rand(sequences, 1, device=device) + 0.5 if per_sequence else tokens().abs()
    if per_sequence and sequences > 2:
        advantages[2] = 0.0
    others = {
        "old_logprobs": tokens(0.4), "advantages": advantages, "mask": tokens.mask,
        "ref_logprobs": tokens(0.4), "rollout_weights": weights,
    }  # fmt: skip

    def function(logprobs: Tensor, entropy: Tensor, **rest: Any) -> dict[str, Tensor]:
        loss, metrics = fr.policy_loss(
            logprobs, entropy=entropy, kl_coef=0.1, entropy_coef=0.2, **rest, **options
        )
        assert not any(x.requires_grad for x in metrics.values())
        return {"loss": loss, **metrics}

    return Example(function, {"logprobs": tokens(0.4), "entropy": tokens()}, others)
