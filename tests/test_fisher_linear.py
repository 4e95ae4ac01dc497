"""The Fisher product of hidden states and a head, against dense matrices."""

import math

import pytest
import torch
from support.compare import relative_error
from support.fisher_matrices import BACKENDS, NAN, dense_fisher, wide
from support.matmuls import MatmulAudit
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from torch import Tensor

from fastrlhf import linear_softmax_fisher_product, reference

TOKENS, WIDTH, VOCAB = 7, 6, 37
TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": 0.5, "temperature": 0.7},
    "capped": {"softcap": 1.5, "scale": 0.8},
    "all": {"softcap": 1.5, "scale": 0.5, "temperature": torch.linspace(0.5, 2, TOKENS)},
}
# Relative L2 errors. bf16: of the products of the tokens, which are rounded before the last matmul.
LINEAR_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def head_inputs(dtype=torch.float64, device="cpu"):
    """Hidden states, weight, tangent, bias and weight_tangent; a mask with some zeros."""
    shapes = (TOKENS, WIDTH), (VOCAB, WIDTH), (TOKENS, WIDTH), (VOCAB,), (VOCAB, WIDTH)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1], device=device)
    return [torch.randn(s, device=device).to(dtype) for s in shapes], mask


def of_dense_matrices(hidden, weight, tangent, bias, weight_tangent, mask, options):
    """The same in fp64: derivatives of the head by torch.func, and one dense matrix for a token."""
    options = dict(options)
    temperature = options.pop("temperature", 1.0)

    def head(hidden, weight):
        raw = hidden @ weight.T + (0 if bias is None else bias)
        return reference.capped_logits(raw, options.get("softcap"), options.get("scale", 1.0))

    turned = torch.zeros_like(weight) if weight_tangent is None else weight_tangent
    logits, moved = torch.func.jvp(head, (hidden, weight), (tangent, turned))
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(len(hidden)).numpy()
    pairs = zip(logits.numpy(), temperatures, strict=True)
    dense = torch.stack([torch.from_numpy(dense_fisher(z, t)) for z, t in pairs])
    product = (dense @ moved[..., None])[..., 0] * mask[:, None]
    _, pull_back = torch.func.vjp(lambda h: head(h, weight), hidden)
    return pull_back(product)[0], (product * moved).sum(-1)


def linear_case(kind, biased, moving, dtype, device="cpu"):
    """Arguments of the linear form, and what dense matrices make of them."""
    tensors, mask = head_inputs(dtype, device)
    hidden, weight, tangent, bias, weight_tangent = tensors
    bias, weight_tangent = bias if biased else None, weight_tangent if moving else None
    exact = [None if x is None else x.cpu().double()
             for x in (hidden, weight, tangent, bias, weight_tangent)]  # fmt: skip
    expected = of_dense_matrices(*exact, mask.cpu(), TRANSFORMS[kind])
    options = {key: x.to(device) if isinstance(x, Tensor) else x
               for key, x in TRANSFORMS[kind].items()}  # fmt: skip
    named = {"bias": bias, "weight_tangent": weight_tangent, "mask": mask, **options}
    return (hidden, weight, tangent), named, expected


@BACKENDS
@pytest.mark.parametrize("dtype", LINEAR_TOLERANCE)
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize(("biased", "moving"), [(False, False), (False, True), (True, True)])
def test_the_linear_form_matches_dense_matrices(impl, dtype, kind, biased, moving, device) -> None:
    args, named, expected = linear_case(kind, biased, moving, dtype, device)
    for chunk_size in (None, 2):
        found = linear_softmax_fisher_product(*args, **named, chunk_size=chunk_size, impl=impl)
        assert found[0].shape == (TOKENS, WIDTH) and found[1].shape == (TOKENS,)
        assert found[0].dtype == found[1].dtype == wide(dtype)
        for value, want in zip(found, expected, strict=True):
            assert relative_error(value, want) <= LINEAR_TOLERANCE[dtype]
            assert not value[[2, 4]].any()


def test_each_part_of_the_head_is_seen() -> None:
    args, named, expected = linear_case("all", True, True, torch.float64)
    for name in ("bias", "weight_tangent", "softcap", "scale", "temperature", "mask"):
        without = {key: x for key, x in named.items() if key != name}
        found = linear_softmax_fisher_product(*args, **without)
        for value, want in zip(found, expected, strict=True):
            assert relative_error(value, want) > 2 * LINEAR_TOLERANCE[torch.bfloat16], name


def test_the_linear_form_reads_nothing_of_masked_rows() -> None:
    args, named, _ = linear_case("all", True, True, torch.float64)
    clean = linear_softmax_fisher_product(*args, **named)
    args[0][[2, 4]], args[2][[2, 4]] = NAN, torch.inf
    found = linear_softmax_fisher_product(*args, **named)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    nothing = linear_softmax_fisher_product(*args, **named | {"mask": torch.zeros(TOKENS)})
    assert not nothing[0].any() and not nothing[1].any()


def test_the_linear_form_of_any_leading_shape() -> None:
    (hidden, weight, tangent), _, _ = linear_case("plain", False, False, torch.float64)
    flat = linear_softmax_fisher_product(hidden[:6], weight, tangent[:6])
    cut = [x[:6].view(3, 2, WIDTH).transpose(0, 1) for x in (hidden, tangent)]
    product, quadratic = linear_softmax_fisher_product(cut[0], weight, cut[1])
    assert product.shape == (2, 3, WIDTH) and quadratic.shape == (2, 3)
    torch.testing.assert_close(product.transpose(0, 1).reshape(6, WIDTH), flat[0])
    torch.testing.assert_close(quadratic.T.reshape(6), flat[1])
    for shape in ((0, WIDTH), (2, 0, WIDTH)):
        empty = torch.zeros(shape, dtype=torch.float64)
        product, quadratic = linear_softmax_fisher_product(empty, weight, empty)
        assert product.shape == shape and quadratic.shape == shape[:-1]


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("kept", [32, 12])
def test_as_many_matmuls_as_documented_and_no_logits(moving, kept) -> None:
    tokens, width, vocab, chunk = 32, 32, 1000, 8
    hidden, tangent = torch.randn(2, tokens, width)
    weight, turned = torch.randn(vocab, width), torch.randn(vocab, width)
    mask = torch.arange(tokens) < kept
    with MatmulAudit() as audit:
        linear_softmax_fisher_product(
            hidden, weight, tangent, weight_tangent=turned if moving else None, mask=mask,
            chunk_size=chunk, bias=torch.randn(vocab), softcap=20.0,
        )  # fmt: skip
    assert audit.operations / (2 * kept * vocab * width) == pytest.approx(3 + moving)
    # A weight, or a few rows of logits: no (N, V).
    assert audit.largest <= max(chunk * vocab, vocab * width)


def test_the_linear_workspace_does_not_grow_with_the_tokens() -> None:
    largest = []
    for tokens in (32, 256):
        hidden, tangent = torch.randn(2, tokens, 4)
        with MatmulAudit() as audit:
            linear_softmax_fisher_product(hidden, torch.randn(5000, 4), tangent, chunk_size=16)
        largest.append(audit.largest)
    assert largest == [16 * 5000] * 2


def test_the_linear_form_is_not_differentiable_and_keeps_its_inputs() -> None:
    args, named, _ = linear_case("all", True, True, torch.float64)
    before = [x.clone() for x in args]
    args = [x.requires_grad_() for x in args]
    found = linear_softmax_fisher_product(*args, **named)
    again = linear_softmax_fisher_product(*args, **named)
    assert not any(x.requires_grad for x in found)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
BAD_HEAD = {
    "integer hidden": (TypeError, "hidden: ", {"hidden": HIDDEN.long()}),
    "width": (ValueError, "(weight|hidden): ", {"weight": torch.zeros(5, 3)}),
    "integer tangent": (TypeError, "tangent: .*floating", {"tangent": HIDDEN.long()}),
    "shape of tangent": (ValueError, r"tangent: .*\(2, 3, 4\)", {"tangent": HIDDEN[:, :2]}),
    "device of tangent": (ValueError, "tangent: .*meta", {"tangent": HIDDEN.to("meta")}),
    "integer turn": (TypeError, "weight_tangent: .*floating", {"weight_tangent": WEIGHT.long()}),
    "shape of turn": (ValueError, r"weight_tangent: .*\(5, 4\)", {"weight_tangent": WEIGHT.T}),
    "device of turn": (ValueError, "weight_tangent: .*meta", {"weight_tangent": WEIGHT.to("meta")}),
    "bias": (ValueError, "bias: ", {"bias": torch.zeros(4)}),
    "mask": (ValueError, r"mask: .*\(2, 3\)", {"mask": torch.zeros(3)}),
    "temperature": (ValueError, "temperature: .*positive", {"temperature": -1.0}),
    "softcap": (ValueError, "softcap: .*positive", {"softcap": 0.0}),
    "scale": (ValueError, "scale: .*positive", {"scale": math.inf}),
    "chunk_size": (ValueError, "chunk_size: ", {"chunk_size": 0}),
    "impl": (ValueError, "impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_HEAD)
def test_bad_input_of_the_linear_form_names_the_argument(case) -> None:
    error, message, arguments = BAD_HEAD[case]
    with pytest.raises(error, match=f"^{message}"):
        linear_softmax_fisher_product(
            **{"hidden": HIDDEN, "weight": WEIGHT, "tangent": HIDDEN} | arguments
        )
