"""gae: the kernel's scan and the eager backend, against the recurrence in 60 digits."""

import math
from decimal import Context, Decimal, localcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastrlhf import gae

BACKENDS = pytest.mark.parametrize("impl", ["eager", "compiled", "triton"])
FINE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
GARBAGE = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e9])

# The kernel scans a block of 32 tokens at a time in the interpreter, and of 1024 on a GPU.
BLOCK = 32


class Expected(NamedTuple):
    """Advantages and returns (B, T), and the size of what each of them adds up."""

    advantages: Tensor
    returns: Tensor
    sizes: Tensor


def blocks_on(device: torch.device, tokens: int) -> int:
    """As many blocks, and parts of them, on a GPU as `tokens` are in the interpreter."""
    return tokens * (1024 // BLOCK if device.type == "cuda" else 1)


def in_python(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Expected:
    """The paper's recurrence over what is left of each row without the tokens that do not count."""
    found = Expected(*(torch.zeros(mask.shape, dtype=torch.float64) for _ in range(3)))
    rows = zip(*(x.double().tolist() for x in (rewards, values, mask)), strict=True)
    with localcontext(Context(prec=60)):
        g, decay = Decimal(gamma), Decimal(gamma) * Decimal(lam)
        for i, (row_rewards, row_values, row_mask) in enumerate(rows):
            next_value = advantage = size = Decimal(0)
            for t in reversed([t for t, keep in enumerate(row_mask) if keep]):
                r, v = Decimal(row_rewards[t]), Decimal(row_values[t])
                advantage = r + g * next_value - v + decay * advantage
                size = abs(r) + abs(g * next_value) + abs(v) + decay * size
                next_value = v
                found.advantages[i, t], found.sizes[i, t] = float(advantage), float(size)
                found.returns[i, t] = float(advantage + v)
    return found


def assert_right(found: tuple[Tensor, Tensor], expected: Expected) -> None:
    """Accept an error of three roundings of what an estimate adds up (the worst seen is one), and
    of none where it adds up nothing.
    """
    for name, actual in zip(("advantages", "returns"), found, strict=True):
        error = (actual.cpu().double() - getattr(expected, name)).abs()
        bound = 3 * torch.finfo(actual.dtype).eps * expected.sizes
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} x bound"


def example(
    tokens: int, dtype: torch.dtype, device: torch.device, garbage: float = math.nan
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask of 3 sequences, with garbage outside of the mask: row 0 counts
    altogether, row 1 not at all, and row 2 has holes, at its ends too.
    """
    mask = torch.rand(3, tokens, device=device) < 0.6
    mask[0], mask[1] = True, False
    mask[2, 0] = mask[2, -1] = False
    rewards, values = (torch.randn(3, tokens, device=device).to(dtype) for _ in range(2))
    return *(torch.where(mask, x, garbage) for x in (rewards, values)), mask


@BACKENDS
@FINE
def test_an_example_by_hand(dtype: torch.dtype, impl: str, device: torch.device) -> None:
    # γ = 0.9, λ = 0.5, so γλ = 0.45. From the end:
    # δ₃ = 3 - 1 = 2                A₃ = 2                       return 2 + 1 = 3
    # δ₂ = 2 + 0.9·1 - 2 = 0.9      A₂ = 0.9 + 0.45·2 = 1.8      return 1.8 + 2 = 3.8
    # δ₁ = 1 + 0.9·2 - 4 = -1.2     A₁ = -1.2 + 0.45·1.8 = -0.39 return -0.39 + 4 = 3.61
    # A token that does not count stands between the first and the second, and one at the end.
    rewards = torch.tensor([[1.0, 50.0, 2.0, 3.0, -7.0]], dtype=dtype, device=device)
    values = torch.tensor([[4.0, 60.0, 2.0, 1.0, 9.0]], dtype=dtype, device=device)
    mask = torch.tensor([[1, 0, 1, 1, 0]], device=device)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5, impl=impl)
    tolerance = 8 * torch.finfo(dtype).eps
    assert advantages.tolist() == [pytest.approx([-0.39, 0, 1.8, 2, 0], rel=tolerance, abs=0)]
    assert returns.tolist() == [pytest.approx([3.61, 0, 3.8, 3, 0], rel=tolerance, abs=0)]


@BACKENDS
@FINE
@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 33, 64, 100])
def test_any_length_agrees_with_the_recurrence(
    tokens: int, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    inputs = example(blocks_on(device, tokens), dtype, device)
    found = gae(*inputs, gamma=0.97, lam=0.9, impl=impl)
    assert found[0].dtype == found[1].dtype == dtype
    assert_right(found, in_python(*inputs, 0.97, 0.9))


@BACKENDS
@FINE
@pytest.mark.parametrize("gamma", [0, 0.9, 1])
@pytest.mark.parametrize("lam", [0, 0.9, 1])
def test_any_discount_agrees_with_the_recurrence(
    lam: float, gamma: float, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    inputs = example(blocks_on(device, 40), dtype, device)
    found = gae(*inputs, gamma=gamma, lam=lam, impl=impl)
    assert_right(found, in_python(*inputs, gamma, lam))


@BACKENDS
@FINE
def test_blocks_may_be_masked_altogether(
    dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    # What a block hands on must come through one, two or three others that hold nothing.
    kept = [[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    block = blocks_on(device, BLOCK)
    mask = torch.tensor(kept, device=device, dtype=torch.bool).repeat_interleave(block, 1)
    rewards, values = (
        torch.where(mask, torch.randn(mask.shape, device=device), math.nan).to(dtype)
        for _ in range(2)
    )
    found = gae(rewards, values, mask, gamma=0.99, lam=0.95, impl=impl)
    assert_right(found, in_python(rewards, values, mask, 0.99, 0.95))


@BACKENDS
@pytest.mark.parametrize("place", [0, 5, 31, 32, 63, 64, 69])
def test_a_single_token_can_stand_anywhere(place: int, impl: str, device: torch.device) -> None:
    mask = torch.zeros(1, blocks_on(device, 70), device=device, dtype=torch.bool)
    mask[0, place] = True
    rewards, values = torch.where(mask, 0.5, math.nan), torch.where(mask, 2.0, math.nan)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.9, impl=impl)
    assert torch.equal(advantages, torch.where(mask, -1.5, 0.0))
    assert torch.equal(returns, torch.where(mask, 0.5, 0.0))


@BACKENDS
@GARBAGE
def test_garbage_outside_of_the_mask_changes_no_bit(
    garbage: float, impl: str, device: torch.device
) -> None:
    rewards, values, mask = example(blocks_on(device, 70), torch.float32, device, garbage)
    expected = gae(*(torch.where(mask, x, 0.0) for x in (rewards, values)), mask, impl=impl)
    for found, clean in zip(gae(rewards, values, mask, impl=impl), expected, strict=True):
        assert torch.equal(found, clean)
        assert (found[~mask] == 0).all()


@BACKENDS
@pytest.mark.parametrize("where", ["rewards", "values"])
def test_a_nan_that_counts_is_not_hidden_and_taints_no_later_token_and_no_other_row(
    where: str, impl: str, device: torch.device
) -> None:
    rewards, values, mask = example(blocks_on(device, 70), torch.float32, device, garbage=0.0)
    expected = gae(rewards, values, mask, impl=impl)
    {"rewards": rewards, "values": values}[where][0, 40] = math.nan
    for found, clean in zip(gae(rewards, values, mask, impl=impl), expected, strict=True):
        assert found[0, :41].isnan().all()
        found[0, :41] = clean[0, :41]
        assert torch.equal(found, clean)


@BACKENDS
def test_monte_carlo_estimates_are_the_sum_of_future_rewards_minus_the_value(
    impl: str, device: torch.device
) -> None:
    # Of eighths, so that sums are exact in any order.
    shape = (2, blocks_on(device, 70))
    rewards, values = (torch.randint(-64, 64, shape, device=device) / 8 for _ in range(2))
    mask = torch.rand(shape, device=device) < 0.7
    future = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0, impl=impl)
    assert torch.equal(advantages, torch.where(mask, future - values, 0.0))
    assert torch.equal(returns, torch.where(mask, future, 0.0))


@BACKENDS
def test_one_step_estimates_are_temporal_differences(impl: str, device: torch.device) -> None:
    shape = (2, blocks_on(device, 70))
    rewards, values = (torch.randint(-64, 64, shape, device=device) / 8 for _ in range(2))
    targets = rewards + 0.5 * torch.cat((values[:, 1:], values.new_zeros(2, 1)), 1)
    mask = torch.ones(shape, device=device)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.0, impl=impl)
    assert torch.equal(advantages, targets - values)
    assert torch.equal(returns, targets)


@BACKENDS
def test_a_row_has_the_same_bits_alone_in_a_batch_and_from_run_to_run(
    impl: str, device: torch.device
) -> None:
    inputs = example(blocks_on(device, 70), torch.float32, device)
    found, again = (gae(*inputs, gamma=0.99, impl=impl) for _ in range(2))
    for row in range(3):
        alone = gae(*(x[row : row + 1] for x in inputs), gamma=0.99, impl=impl)
        for one, two, single in zip(found, again, alone, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one[row : row + 1], single)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "transposed":
        return x.t().contiguous().t()
    wide = torch.ones(x.shape[0], 2 * x.shape[1] + 3, dtype=x.dtype, device=x.device)
    view = wide[:, 3 : 3 + x.shape[1]] if layout == "slice" else wide[:, 3::2]
    view.copy_(x)
    assert not view.is_contiguous()
    return view


@BACKENDS
@pytest.mark.parametrize("layout", ["slice", "every other", "transposed"])
@pytest.mark.parametrize("which", ["rewards", "values", "mask"])
def test_strides_do_not_matter(which: str, layout: str, impl: str, device: torch.device) -> None:
    rewards, values, mask = example(37, torch.float32, device)
    inputs = {"rewards": rewards, "values": values, "mask": mask}
    expected = gae(**inputs, impl=impl)
    inputs[which] = laid_out(inputs[which], layout)
    for found, contiguous in zip(gae(**inputs, impl=impl), expected, strict=True):
        assert torch.equal(found, contiguous)


@BACKENDS
def test_inputs_may_be_expanded(impl: str, device: torch.device) -> None:
    rewards, _, mask = example(37, torch.float32, device, garbage=0.0)
    value, row = torch.tensor(0.5, device=device).expand(3, 37), mask[2:3].expand(3, 37)
    expected = gae(rewards, value.clone(), row.clone(), impl=impl)
    for found, dense in zip(gae(rewards, value, row, impl=impl), expected, strict=True):
        assert torch.equal(found, dense)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
def test_masks_can_be_zeros_and_ones(dtype: torch.dtype, impl: str, device: torch.device) -> None:
    rewards, values, mask = example(37, torch.float32, device)
    expected = gae(rewards, values, mask, impl=impl)
    found = gae(rewards, values, mask.to(dtype), impl=impl)
    assert all(torch.equal(x, of_bool) for x, of_bool in zip(found, expected, strict=True))


@BACKENDS
@pytest.mark.parametrize(
    ("rewards_dtype", "values_dtype", "computed_in"),
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_the_wider_dtype_counts_and_half_precision_is_computed_in_fp32(
    rewards_dtype: torch.dtype,
    values_dtype: torch.dtype,
    computed_in: torch.dtype,
    impl: str,
    device: torch.device,
) -> None:
    rewards, values, mask = example(37, torch.float64, device)
    rewards, values = rewards.to(rewards_dtype), values.to(values_dtype)
    expected = gae(rewards.to(computed_in), values.to(computed_in), mask, impl=impl)
    for found, wide in zip(gae(rewards, values, mask, impl=impl), expected, strict=True):
        assert found.dtype == computed_in
        assert torch.equal(found, wide)


@BACKENDS
def test_results_are_constants_of_the_training_step(impl: str, device: torch.device) -> None:
    rewards, values, mask = example(5, torch.float32, device)
    results = gae(rewards.requires_grad_(), values.requires_grad_(), mask, impl=impl)
    assert not any(x.requires_grad for x in results)


@BACKENDS
def test_inputs_are_left_as_they_were(impl: str, device: torch.device) -> None:
    inputs = example(37, torch.float32, device, garbage=7.0)
    copies = [x.clone() for x in inputs]
    gae(*inputs, impl=impl)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_an_empty_batch_gives_empty_results(
    shape: tuple[int, int], impl: str, device: torch.device
) -> None:
    empty = torch.zeros(shape, dtype=torch.float64, device=device)
    for found in gae(empty.bfloat16(), empty, empty > 0, impl=impl):
        assert found.shape == shape and found.dtype == torch.float64


def test_the_kernel_runs_unless_it_is_told_not_to(device: torch.device) -> None:
    inputs = example(37, torch.float32, device)
    explicit = gae(*inputs, gamma=1.0, lam=0.95, impl="triton")
    for auto, kernel in zip(gae(*inputs), explicit, strict=True):
        assert torch.equal(auto, kernel)


def without_carry(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """What comes out if a block knows nothing of the next."""
    parts = zip(*(x.split(BLOCK, 1) for x in (rewards, values, mask)), strict=True)
    blocks = [gae(*part, gamma=0.99, lam=0.95, impl="eager") for part in parts]
    return tuple(torch.cat(x, 1) for x in zip(*blocks, strict=True))


eager = partial(gae, impl="eager")

MUTANTS = {
    "gamma off": lambda r, v, m: eager(r, v, m, gamma=0.99 * (1 + 1e-5)),
    "lambda off": lambda r, v, m: eager(r, v, m, gamma=0.99, lam=0.95 * (1 + 1e-5)),
    "one-step": lambda r, v, m: eager(r, v, m, gamma=0.99, lam=0.0),
    "holes count": lambda r, v, m: eager(r, v, torch.ones_like(m), gamma=0.99),
    "no carry between blocks": without_carry,
    "first token lost": lambda r, v, m: eager(r, v, m & (torch.arange(100) > 0), gamma=0.99),
    "rewards of the next token": lambda r, v, m: eager(r.roll(-1, 1), v, m, gamma=0.99),
    "a value after the end": lambda r, v, m: eager(
        r + 1e-4 * (torch.arange(100) == 99), v, m, gamma=0.99
    ),
    "rewards rounded": lambda r, v, m: eager(r.bfloat16(), v, m, gamma=0.99),
    "swapped": lambda r, v, m: eager(r, v, m, gamma=0.99)[::-1],
    "off by 1e-5": lambda r, v, m: [x * (1 + 1e-5) for x in eager(r, v, m, gamma=0.99)],
    "zero": lambda r, v, m: (torch.zeros_like(r), torch.zeros_like(r)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_with_the_recurrence_rejects(mutant: str) -> None:
    cpu = torch.device("cpu")
    rewards, values, mask = example(100, torch.float32, cpu, garbage=0.0)
    expected = in_python(rewards, values, mask, 0.99, 0.95)
    assert_right(eager(rewards, values, mask, gamma=0.99), expected)
    with pytest.raises(AssertionError, match="x bound"):
        assert_right(MUTANTS[mutant](rewards, values, mask), expected)


_ZEROS = torch.zeros(2, 3)


@BACKENDS
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rewards": [[0.0]]}, TypeError, "rewards: expected a tensor, got list"),
        ({"rewards": _ZEROS.cfloat()}, TypeError, "rewards: .*real.*complex"),
        ({"rewards": torch.zeros(3)}, ValueError, r"rewards: .*\(B, T\), got \(3,\)"),
        ({"rewards": torch.zeros(2, 3, 1)}, ValueError, r"rewards: .*\(B, T\), got \(2, 3, 1\)"),
        ({"values": None}, TypeError, "values: expected a tensor, got NoneType"),
        ({"values": _ZEROS.long()}, TypeError, "values: .*floating.*int64"),
        ({"values": torch.zeros(2, 4)}, ValueError, r"values: .*\(2, 3\).*got \(2, 4\)"),
        ({"values": _ZEROS.to("meta")}, ValueError, "values: expected on cpu"),
        ({"mask": None}, TypeError, "mask: expected a tensor, got NoneType"),
        ({"mask": _ZEROS * 1j}, TypeError, "mask: .*boolean or 0/1"),
        ({"mask": torch.ones(2, 1)}, ValueError, r"mask: .*\(2, 3\).*got \(2, 1\)"),
        ({"mask": _ZEROS.to("meta")}, ValueError, "mask: expected on cpu"),
        ({"gamma": 1.01}, ValueError, r"gamma: .*\[0, 1\], got 1.01"),
        ({"gamma": -0.1}, ValueError, r"gamma: .*\[0, 1\], got -0.1"),
        ({"gamma": math.nan}, ValueError, r"gamma: .*\[0, 1\], got nan"),
        ({"gamma": torch.tensor(1.0)}, TypeError, "gamma: expected a number, got Tensor"),
        ({"lam": 1.01}, ValueError, r"lam: .*\[0, 1\], got 1.01"),
        ({"lam": -0.1}, ValueError, r"lam: .*\[0, 1\], got -0.1"),
        ({"lam": None}, TypeError, "lam: expected a number, got NoneType"),
        ({"impl": "cuda"}, ValueError, "impl: .*'cuda'"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str, impl: str
) -> None:
    arguments = {"rewards": _ZEROS, "values": _ZEROS, "mask": _ZEROS > 0, "impl": impl}
    with pytest.raises(error, match=message):
        gae(**{**arguments, **changed})
