"""Distillation from the likeliest words of a teacher, from hidden states, against that of the
logits, at the stated cost.
"""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate, relative_error
from support.matmuls import MatmulAudit
from support.topk_formulas import DIRECTIONS, RESTS
from torch import Tensor, autograd

from fastrlhf import QuantizedWeight, linear_topk_kl_divergence, topk_kl_divergence

TOKENS, WIDTH, VOCAB, WORDS = 11, 6, 37, 4
NAMES = ("hidden", "weight", "bias")
MASK = torch.ones(TOKENS, dtype=torch.bool)
MASK[[0, 4]] = False
TRANSFORMS = {
    "plain": {},
    "all": {"softcap": 3.0, "scale": 0.5, "temperature": torch.linspace(0.5, 2, TOKENS)},
}


def inputs(needs=NAMES, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments, with garbage off the mask."""
    hidden, weight, bias = (torch.randn(s) for s in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
    logprobs, ids = torch.randn(TOKENS, VOCAB).log_softmax(-1).topk(WORDS)
    ids[2, 1], logprobs[3, 2] = -1, -torch.inf
    hidden[0], logprobs[0], ids[4] = torch.nan, torch.nan, VOCAB + 3
    tensors = {
        name: x.to(dtype).requires_grad_(name in needs)
        for name, x in zip(NAMES, (hidden, weight, bias), strict=True)
    }
    return tensors | {"teacher_logprobs": logprobs, "teacher_ids": ids}


def from_logits(tensors: dict[str, Tensor], mask: Tensor = MASK, **options) -> Tensor:
    """The eager equivalent, garbage taken out."""
    teacher = {name: tensors[name] for name in ("teacher_logprobs", "teacher_ids")}
    hidden = tensors["hidden"].where(mask.unsqueeze(-1), 0.0)
    logits = F.linear(hidden, tensors["weight"], tensors.get("bias"))
    return topk_kl_divergence(logits, **teacher, mask=mask, **{"impl": "eager", **options})


def gradients(values: Tensor, tensors: dict[str, Tensor], *, alike: bool) -> dict[str, Tensor]:
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    weights = torch.full(values.shape, 0.7) if alike else torch.linspace(-1, 2, values.numel())
    loss = (values * weights.to(values.device)).sum()
    return dict(zip(wanted, autograd.grad(loss, list(wanted.values())), strict=True))


def again(tensors: dict[str, Tensor], needs, device="cpu") -> dict[str, Tensor]:
    return {n: x.detach().to(device).requires_grad_(n in needs) for n, x in tensors.items()}


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), NAMES], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_gradient_is_that_of_the_logits(needs, transform) -> None:
    tensors = inputs(needs)
    for i, direction in enumerate(DIRECTIONS):
        rest = list(RESTS.values())[i % 3]
        options = {"direction": direction, **rest, **TRANSFORMS[transform]}
        expected = from_logits(tensors, **options)
        for chunk_size, alike in ((3, True), (4, False), (None, False)):
            values = linear_topk_kl_divergence(
                **tensors, mask=MASK, chunk_size=chunk_size, **options
            )
            torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
            found = gradients(values, tensors, alike=alike)
            of_logits = gradients(from_logits(tensors, **options), tensors, alike=alike)
            assert set(found) == set(needs)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, of_logits[name], rtol=1e-9, atol=1e-11)
    if "hidden" in needs:
        assert not found["hidden"][~MASK].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kernels_give_the_same(direction, device) -> None:
    tensors, options = inputs(), {"direction": direction, **TRANSFORMS["all"]}
    expected = from_logits(tensors, **options)
    of_logits = gradients(expected, tensors, alike=False)
    moved = again(tensors, NAMES, device)
    values = linear_topk_kl_divergence(
        **moved, mask=MASK.to(device), chunk_size=5, impl="triton",
        **options | {"temperature": options["temperature"].to(device)},
    )  # fmt: skip
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-10, atol=1e-12)
    for name, gradient in gradients(values, moved, alike=False).items():
        torch.testing.assert_close(gradient.cpu(), of_logits[name], rtol=1e-9, atol=1e-11)


def test_other_shapes_and_no_bias() -> None:
    tensors = {name: x for name, x in inputs(("hidden",)).items() if name != "bias"}
    flat = linear_topk_kl_divergence(**tensors, mask=MASK)
    torch.testing.assert_close(flat, from_logits(tensors))
    batch = {n: x if n == "weight" else torch.stack([x] * 2) for n, x in tensors.items()}
    values = linear_topk_kl_divergence(**batch, mask=MASK.float().expand(2, -1), chunk_size=4)
    torch.testing.assert_close(values, flat.expand(2, -1))
    (gradient,) = autograd.grad(values.sum(), tensors["hidden"])
    (expected,) = autograd.grad(flat.sum(), tensors["hidden"])
    torch.testing.assert_close(gradient, 2 * expected)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_nothing_to_do(needs) -> None:
    tensors = inputs(needs)
    empty = {n: x if n in ("weight", "bias") else x[:0] for n, x in tensors.items()}
    for values in (
        linear_topk_kl_divergence(**empty),
        linear_topk_kl_divergence(**tensors, mask=torch.zeros_like(MASK)),
    ):
        assert not values.any()
        for name, gradient in gradients(values, tensors, alike=False).items():
            assert gradient.shape == tensors[name].shape and not gradient.any()


def test_whatever_upstream_gradient_reaches_a_masked_token_does_no_harm() -> None:
    upstream = torch.where(MASK, torch.linspace(1, 2, TOKENS), torch.nan)
    for weights in (upstream, torch.where(MASK, 1.0, torch.nan)):
        tensors = inputs()
        values = linear_topk_kl_divergence(**tensors, mask=MASK, chunk_size=3)
        for gradient in autograd.grad(values @ weights.double(), [tensors[n] for n in NAMES]):
            assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_errors_are_at_most_twice_those_of_fp32_logits(dtype, needs) -> None:
    tensors = inputs(needs, dtype)
    runs = []
    for kind in (None, torch.float32, torch.float64):
        given = again(tensors, needs)
        if kind is torch.float64:
            given = {n: x.double() if n in NAMES else x for n, x in given.items()}
            given = again(given, needs)
        if kind is None:
            values = linear_topk_kl_divergence(**given, mask=MASK)
            assert values.dtype == torch.float32
        else:
            up = {n: x.to(kind) if n in NAMES else x for n, x in given.items()}
            values = from_logits(up)
        runs.append({"values": values.detach(), **gradients(values, given, alike=False)})
    ours, eager, exact = runs
    for name in exact:
        rounding = torch.finfo(ours[name].dtype).eps
        bound = 2 * relative_error(eager[name], exact[name]) + rounding
        assert relative_error(ours[name], exact[name]) <= bound, name
        assert name == "values" or ours[name].dtype == tensors[name].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype) -> None:
    tensors = inputs(("hidden", "weight"))
    tensors = {n: x.float() if n in NAMES else x for n, x in tensors.items()}
    tensors["hidden"] = tensors["hidden"].to(dtype)
    tensors = again(tensors, ("hidden", "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_topk_kl_divergence(**tensors, mask=MASK)
    exact = {
        n: (x.bfloat16().double() if n in NAMES[:2] else x.double() if n in NAMES else x).detach()
        for n, x in tensors.items()
    }
    exact = again(exact, ("hidden", "weight"))
    expected = from_logits(exact)
    plain = from_logits({n: x.float() if n in NAMES else x for n, x in exact.items()})
    assert_as_accurate(found, plain, expected)
    of_logits = gradients(expected, exact, alike=True)
    for name, gradient in gradients(found, tensors, alike=True).items():
        assert gradient.dtype == tensors[name].dtype
        # That of hidden states is rounded to bf16: twice where it waits for its coefficient.
        bound = 8e-3 if name == "hidden" else 1e-5
        assert relative_error(gradient, of_logits[name]) < bound


def test_a_quantized_head() -> None:
    codes = torch.randint(-127, 128, (VOCAB, 8), dtype=torch.int8)
    scales = torch.rand(VOCAB) * 0.01
    quantized = QuantizedWeight(codes, scales, 8, None, torch.float32)
    hidden = torch.randn(5, 8, requires_grad=True)
    teacher = torch.randn(5, VOCAB).log_softmax(-1).topk(WORDS)
    bias = torch.randn(VOCAB, requires_grad=True)
    runs = []
    for head in (quantized, codes.float() * scales[:, None]):
        values = linear_topk_kl_divergence(hidden, head, *teacher, bias=bias)
        runs.append([values])
        for weights in (torch.ones(5), torch.arange(5.0)):
            runs[-1] += autograd.grad(values @ weights, (hidden, bias), retain_graph=True)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


WIDE = {"tokens": 64, "width": 32, "vocab": 1000}


def matmuls(needs=(), *, grad: bool = True, alike: bool = True) -> float:
    """Matmuls of forward and backward in units of G, on the half of the tokens that is not
    masked.
    """
    tokens, width, vocab = WIDE.values()
    shapes = ((tokens, width), (vocab, width), (vocab,))
    tensors = {
        n: torch.randn(s).requires_grad_(n in needs) for n, s in zip(NAMES, shapes, strict=True)
    }
    teacher = torch.randn(tokens, vocab).log_softmax(-1).topk(8)
    mask = torch.arange(tokens) % 2 == 0
    weights = torch.ones(tokens) if alike else torch.rand(tokens)
    with MatmulAudit() as audit, torch.set_grad_enabled(grad):
        values = linear_topk_kl_divergence(
            tensors["hidden"], tensors["weight"], *teacher, bias=tensors["bias"], mask=mask,
            chunk_size=8,
        )  # fmt: skip
        if needs and grad:
            (values * weights).sum().backward()
    # One gradient of the weight, or nine rows of logits: no (n, V), let alone (N, V).
    assert audit.largest <= vocab * width
    return audit.operations / (2 * tokens // 2 * vocab * width)


@pytest.mark.parametrize(
    ("needs", "cost", "more_if_not_alike"),
    [
        ((), 1, 0),
        (("hidden",), 2, 0),
        (("weight",), 2, 2),
        (("bias",), 1, 1),
        (("hidden", "weight"), 3, 2),
        (NAMES, 3, 2),
    ],
)
def test_as_many_matmuls_as_stated_on_the_tokens_of_the_mask(
    needs, cost, more_if_not_alike
) -> None:
    assert matmuls(needs) == pytest.approx(cost, rel=1e-6)
    assert matmuls(needs, grad=False) == pytest.approx(1, rel=1e-6)
    if needs:
        assert matmuls(needs, alike=False) == pytest.approx(cost + more_if_not_alike, rel=1e-6)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_the_workspace_does_not_grow_with_the_tokens(needs) -> None:
    largest = []
    for tokens in (32, 128):
        shapes = ((tokens, 4), (5000, 4), (5000,))
        tensors = {
            n: torch.randn(s).requires_grad_(n in needs) for n, s in zip(NAMES, shapes, strict=True)
        }
        teacher = torch.full((tokens, 3), -2.0), torch.tensor([[7, 3, 4999]]).expand(tokens, -1)
        with MatmulAudit() as audit:
            values = linear_topk_kl_divergence(
                tensors["hidden"], tensors["weight"], *teacher, bias=tensors["bias"], chunk_size=16
            )
            values.sum().backward()
        largest.append(audit.largest)
    assert largest[0] == largest[1] == 16 * 5000


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), NAMES])
def test_a_second_derivative_is_refused(needs) -> None:
    tensors = inputs(needs)
    values = linear_topk_kl_divergence(**tensors, mask=MASK)
    with pytest.raises(RuntimeError, match=r"^linear_topk_kl_divergence: .*topk_kl_divergence"):
        autograd.grad(values.sum(), [tensors[name] for name in needs], create_graph=True)


def test_first_derivatives_by_finite_differences() -> None:
    tensors = inputs()
    with torch.no_grad():  # finite differences cannot step from NaN
        tensors["hidden"][0] = 0.0
    teacher = {n: tensors.pop(n) for n in ("teacher_logprobs", "teacher_ids")}
    for direction in DIRECTIONS:

        def values(hidden, weight, bias, direction=direction):
            return linear_topk_kl_divergence(
                hidden, weight, bias=bias, mask=MASK, softcap=4.0, chunk_size=4,
                direction=direction, **teacher,
            )  # fmt: skip

        assert autograd.gradcheck(values, list(tensors.values()), fast_mode=True)


def test_transforms_of_torch_func_build_the_logits() -> None:
    tensors = inputs(("hidden",))
    hidden = tensors.pop("hidden")

    def value(x):
        return linear_topk_kl_divergence(x, **tensors, mask=MASK, direction="jsd").square().sum()

    expected = autograd.grad(value(hidden), hidden)[0]
    torch.testing.assert_close(torch.func.grad(value)(hidden.detach()), expected)


def test_the_same_bits_twice_and_whatever_the_chunks_are() -> None:
    tensors = inputs(dtype=torch.float32)
    runs = []
    for _ in range(2):
        values = linear_topk_kl_divergence(**tensors, mask=MASK, chunk_size=3)
        runs.append([values, *gradients(values, tensors, alike=False).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# The compiler looks at what tensors hold where it leaves the graph and comes back.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_gives_the_same() -> None:
    torch.compiler.reset()
    tensors = inputs(("hidden", "weight"))

    def step(hidden, weight):
        given = tensors | {"hidden": hidden, "weight": weight}
        return linear_topk_kl_divergence(**given, mask=MASK, chunk_size=4).sum()

    sides = tensors["hidden"], tensors["weight"]
    compiled = torch.compile(step, backend="aot_eager")
    for a, b in zip(
        autograd.grad(compiled(*sides), sides), autograd.grad(step(*sides), sides), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(TOKENS, WIDTH + 1)}, ValueError, "^hidden: "),
        ({"hidden": torch.zeros(TOKENS, WIDTH).long()}, TypeError, "^hidden: "),
        ({"weight": None}, TypeError, "^weight: "),
        ({"weight": torch.zeros(VOCAB, WIDTH).bfloat16()}, TypeError, "^weight: "),
        ({"bias": torch.zeros(VOCAB + 1)}, ValueError, "^bias: "),
        ({"teacher_ids": torch.zeros(TOKENS, 1)}, TypeError, "^teacher_ids: "),
        ({"teacher_ids": torch.full((TOKENS, 1), VOCAB)}, ValueError, "^teacher_ids: .*got 37"),
        ({"teacher_logprobs": torch.zeros(TOKENS)}, ValueError, "^teacher_logprobs: "),
        ({"mask": torch.ones(3)}, ValueError, r"^mask: .*\(11,\).*\(3,\)"),
        ({"direction": "kl"}, ValueError, "^direction: "),
        ({"renormalize": True}, ValueError, "^renormalize: "),
        ({"beta": 2.0}, ValueError, "^beta: "),
        ({"temperature": torch.zeros(TOKENS)}, ValueError, "^temperature: "),
        ({"softcap": -1.0}, ValueError, "^softcap: "),
        ({"chunk_size": 0}, ValueError, "^chunk_size: "),
        ({"impl": "cuda"}, ValueError, "^impl: "),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message) -> None:
    arguments = {
        "hidden": torch.zeros(TOKENS, WIDTH), "weight": torch.zeros(VOCAB, WIDTH),
        "teacher_logprobs": torch.full((TOKENS, 1), -1.0),
        "teacher_ids": torch.zeros(TOKENS, 1).long(), **changes,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_topk_kl_divergence(**arguments)
