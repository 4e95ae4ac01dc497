"""What the backends of the Fisher product do besides their numbers: layouts, bits, memory, what
they read and write, operators, graphs and errors.
"""

import pytest
import torch
from support.fisher_matrices import BACKENDS, NAN, assert_fisher_close, random_rows
from support.one_thread import one_thread  # noqa: F401  of every test in this file
from torch import Tensor

from fastrlhf import softmax_fisher_product
from fastrlhf.recipes.memory import peak_memory


def layouts(content: Tensor) -> dict[str, Tensor]:
    """(2, 3, 65) tensors of one content in many layouts, by name."""
    new = lambda *shape: content.new_full(shape, NAN)  # noqa: E731
    views = {
        "contiguous": new(2, 3, 65),
        "all but the last position": new(2, 4, 65)[:, :-1],
        "part of the vocabulary": new(2, 3, 80)[..., 7:72],
        "every other token": new(2, 3, 130)[..., ::2],
        "vocabulary first": new(65, 3, 2).permute(2, 1, 0),
        "positions first": new(3, 2, 65).transpose(0, 1),
        "odd offset": new(2 * 3 * 65 + 3)[3:].view(2, 3, 65),
    }
    return {name: view.copy_(content) for name, view in views.items()}


@BACKENDS
@pytest.mark.parametrize("layout", layouts(torch.zeros(2, 3, 65)))
def test_layouts_do_not_matter(impl, layout, device) -> None:
    contents = [torch.randn(2, 3, 65, device=device) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], device=device)
    own = (torch.rand(3, 2, device=device) + 0.5).T
    options = {"mask": mask, "temperature": own, "impl": impl}
    expected = softmax_fisher_product(*contents, **options)
    logits, tangent = (layouts(content) for content in contents)
    other = "every other token" if layout == "contiguous" else "contiguous"
    for pair in ((layout, layout), (layout, other), (other, layout)):
        found = softmax_fisher_product(logits[pair[0]], tangent[pair[1]], **options)
        assert found[0].shape == (2, 3, 65) and found[1].shape == (2, 3)
        for value, want in zip(found, expected, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)


@BACKENDS
def test_expanded_rows(impl, device) -> None:
    logits, tangent = random_rows(4, 30, device)
    single = logits[:1].expand(4, 30)
    expected = softmax_fisher_product(single.contiguous(), tangent, impl=impl)
    found = softmax_fisher_product(single, tangent, impl=impl)
    flat = softmax_fisher_product(tangent, single, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    expected = softmax_fisher_product(tangent, single.contiguous(), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(flat, expected, strict=True))


@BACKENDS
def test_empty_and_smallest_shapes(impl, device) -> None:
    for shape in ((0, 5), (2, 0, 5), (0, 3, 5)):
        empty = torch.randn(shape, device=device)
        product, quadratic = softmax_fisher_product(empty, empty, impl=impl)
        assert product.shape == shape and quadratic.shape == shape[:-1]
    logits, tangent = (x[0] for x in random_rows(1, 9, device))
    product, quadratic = softmax_fisher_product(logits, tangent, impl=impl)
    assert product.shape == (9,) and quadratic.shape == ()
    assert_fisher_close(
        (product[None], quadratic[None]), logits[None], tangent[None], 1.0, 8e-6, 8e-6
    )


@BACKENDS
@pytest.mark.parametrize("vocab", [1000, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, vocab, dtype, device) -> None:
    rows = 1000 if device.type == "cuda" else 12
    logits, tangent = random_rows(rows, vocab, device, dtype)
    mask = torch.arange(rows, device=device) % 5 != 2
    options = {"impl": impl, "temperature": 0.7}
    found, again = (softmax_fisher_product(logits, tangent, mask=mask, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for row in (0, 1, rows - 1):
        one = slice(row, row + 1)
        alone = softmax_fisher_product(logits[one], tangent[one], **options)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, found, strict=True))


@BACKENDS
def test_neither_result_is_differentiable_and_inputs_keep_their_bits(impl, device) -> None:
    logits, tangent = (x.requires_grad_() for x in random_rows(3, 20, device))
    before = logits.detach().clone(), tangent.detach().clone()
    product, quadratic = softmax_fisher_product(logits, tangent, impl=impl)
    assert not product.requires_grad and not quadratic.requires_grad
    assert torch.equal(logits, before[0]) and torch.equal(tangent, before[1])


@BACKENDS
def test_a_temperature_tensor_broadcasts(impl, device) -> None:
    logits, tangent = torch.randn(2, 2, 3, 20, device=device)
    own = torch.tensor([[0.5], [2.0]], device=device)
    found = softmax_fisher_product(logits, tangent, temperature=own, impl=impl)
    for i, temperature in enumerate((0.5, 2.0)):
        expected = softmax_fisher_product(logits[i], tangent[i], temperature=temperature, impl=impl)
        for value, want in zip(found, expected, strict=True):
            torch.testing.assert_close(value[i], want)


def test_memory_is_the_product_and_a_bounded_rest(device) -> None:
    logits, tangent = (torch.randn(1200, 20000, device=device).bfloat16() for _ in range(2))
    (product, _), peak = peak_memory(lambda: softmax_fisher_product(logits, tangent), device)
    # On a CPU some chunks of 4 MiB: all of it in fp32 would be 92 MiB a tensor.
    rest = 2**20 if device.type == "cuda" else 10 * 2**22
    assert product.nbytes <= peak <= product.nbytes + rest


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts on the CPU")
@pytest.mark.parametrize("vocab", [1000, 4100, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_inputs_are_read_twice_and_the_product_is_written_once(
    vocab, dtype, monkeypatch
) -> None:
    from support.traffic import counted_traffic

    logits, tangent = random_rows(4, vocab, "cpu", dtype)
    mask = torch.tensor([1, 0, 1, 1])
    with counted_traffic(monkeypatch) as traffic:
        product, quadratic = softmax_fisher_product(logits, tangent, mask=mask, impl="triton")
    row = vocab * dtype.itemsize
    assert traffic.loaded(logits) == traffic.loaded(tangent) == 2 * 3 * row
    assert traffic.stored(logits) == traffic.stored(tangent) == traffic.loaded(product) == 0
    assert traffic.stored(product) == 4 * row and traffic.stored(quadratic) == quadratic.nbytes
    assert sum(traffic.launches.values()) == 1
    assert traffic.loaded() + traffic.stored() <= 16 * row + 4 * 32


@BACKENDS
def test_the_operator_passes_opcheck(impl, device) -> None:
    logits, tangent = random_rows(3, 20, device)
    mask = torch.tensor([True, False, True], device=device)
    own = torch.rand(3, device=device) + 0.5
    operator = torch.ops.fastrlhf.fisher_product.default
    torch.library.opcheck(operator, (logits, tangent.bfloat16(), mask, None, 0.7, impl))
    torch.library.opcheck(operator, (logits.double(), tangent, mask, own, 1.0, impl))


@BACKENDS
def test_it_compiles_whole(impl, device) -> None:
    torch.compiler.reset()
    logits, tangent = torch.randn(2, 4, 6, 37, device=device)
    mask = torch.rand(4, 6, device=device) > 0.3

    def work(logits, tangent, mask):
        product, quadratic = softmax_fisher_product(
            2 * logits, tangent, mask=mask, temperature=0.7, impl=impl
        )
        return product.sum(-1) + quadratic, product

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for found, plain in zip(
        compiled(logits, tangent, mask), work(logits, tangent, mask), strict=True
    ):
        torch.testing.assert_close(found, plain)


ZEROS = torch.zeros(2, 3, 5)
BAD_INPUT = {
    "integer logits": (TypeError, "logits: .*floating.*int64", {"logits": ZEROS.long()}),
    "fp8 logits": (TypeError, "logits: .*float8", {"logits": ZEROS.to(torch.float8_e4m3fn)}),
    "a list": (TypeError, "logits: expected a tensor, got list", {"logits": [1.0]}),
    "0-d logits": (ValueError, r"logits: .*\(\.\.\., V\)", {"logits": torch.tensor(1.0)}),
    "empty vocabulary": (ValueError, "logits: .*V > 0", {"logits": torch.zeros(2, 3, 0)}),
    "integer tangent": (TypeError, "tangent: .*floating.*int64", {"tangent": ZEROS.long()}),
    "a number as tangent": (TypeError, "tangent: expected a tensor", {"tangent": 1.0}),
    "shape": (ValueError, r"tangent: .*\(2, 3, 5\).*got \(2, 5\)", {"tangent": ZEROS[:, 0]}),
    "device": (ValueError, "tangent: .*meta", {"tangent": ZEROS.to("meta")}),
    "shape of the mask": (ValueError, r"mask: .*\(2, 3\)", {"mask": torch.ones(2, 2)}),
    "device of the mask": (ValueError, "mask: .*meta", {"mask": torch.ones(2, 3, device="meta")}),
    "zero temperature": (ValueError, "temperature: .*positive", {"temperature": 0.0}),
    "one bad temperature": (
        ValueError,
        "temperature: .*positive.*got -1",
        {"temperature": torch.tensor([[1.0, 1, 1], [1, -1, 1]])},
    ),
    "temperatures of another shape": (
        ValueError,
        r"temperature: .*\(2, 3\).*got \(3,\)",
        {"temperature": torch.ones(3)},
    ),
    "unknown impl": (ValueError, "impl: .*'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_names_the_argument(case) -> None:
    error, message, arguments = BAD_INPUT[case]
    with pytest.raises(error, match=f"^{message}"):
        softmax_fisher_product(**{"logits": ZEROS, "tangent": ZEROS} | arguments)
