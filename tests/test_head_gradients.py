"""What matmuls of a GPU ask for, on the CPU: 16-bit operands, rows at aligned distances, gradients
of logits that wait for each other.

The matmul itself, which takes such operands and gives fp32, is made of an fp32 one.
"""

import pytest
import torch
from torch import Tensor, autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrlhf
from fastrlhf.ops import head_gradients, linear_head, linear_rows
from fastrlhf.ops.linear_head import Head, QuantizedWeight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, WIDTH, VOCAB = 40, 32, 1009


class Matmuls:
    """The matmuls that were done, by the shapes of their factors."""

    def __init__(self) -> None:
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def add_product(self, total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
        assert a.dtype == b.dtype
        self.shapes.append((a.shape, b.shape))
        for operand in (a, b, total):
            if a.itemsize == 2 and operand.shape[-1] == VOCAB and operand.stride(-1) == 1:
                assert operand.stride(0) * operand.itemsize % 16 == 0
        product = a.to(total.dtype) @ b.to(total.dtype)
        total.copy_(product if fresh else total + product)

    def of_weight(self) -> int:
        """How many of them add to the gradient of a weight."""
        return sum(a[0] == VOCAB and b[1] == WIDTH for a, b in self.shapes)


@pytest.fixture
def like_a_gpu(monkeypatch) -> Matmuls:
    matmuls = Matmuls()
    monkeypatch.setattr(linear_head, "operand_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(linear_head, "_add_product", matmuls.add_product)
    monkeypatch.setitem(head_gradients._ROW_ALIGNMENT, "cpu", 64)
    return matmuls


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets; the first tokens are nearly certain."""
    hidden = torch.randn(2, TOKENS // 2, WIDTH)
    weight = 2 * torch.randn(VOCAB, WIDTH) / WIDTH**0.5
    targets = torch.randint(VOCAB, (2, TOKENS // 2))
    hidden[:, :3] = 3 * weight[targets[:, :3]]
    targets[0, 5] = -100
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight, torch.randn(VOCAB) / 8))
    return *leaves, targets


def token_loss(inputs, size: float) -> Tensor:
    """Some tokens have no gradient, like those whose ratio is clipped."""
    hidden, weight, bias, targets = inputs
    sizes = torch.full(targets.shape, size)
    sizes[:, 3 : TOKENS // 4] = 0.0
    return fastrlhf.linear_loss(
        lambda stats, scale: -(stats.logprob * scale).sum(), hidden, weight, targets, sizes,
        bias=bias, chunk_size=8,
    )[0]  # fmt: skip


def z_loss(inputs, size: float) -> Tensor:
    """A term that pulls the log-sum-exp to 0, and a log-prob, which is left out for some tokens."""
    hidden, weight, bias, targets = inputs
    likelihood = torch.full(targets.shape, size)
    likelihood[:, 5 : TOKENS // 4] = 0.0
    return fastrlhf.linear_loss(
        lambda stats, likelihood: (
            0.02 * size * stats.lse.square().sum() - (stats.logprob * likelihood).sum()
        ),
        hidden, weight, targets, likelihood, bias=bias, chunk_size=8,
    )[0]  # fmt: skip


def group_loss(inputs, size: float) -> Tensor:
    hidden, weight, bias, targets = inputs
    groups = torch.arange(2)[:, None].expand_as(targets)
    return fastrlhf.linear_loss(
        lambda stats: -(stats.logprob * size).sum(), hidden, weight, targets, groups=groups,
        bias=bias, chunk_size=24,
    )[0]  # fmt: skip


def statistics(inputs, size: float) -> Tensor:
    hidden, weight, bias, targets = inputs
    stats = fastrlhf.linear_token_stats(
        hidden, weight, targets, bias=bias, entropy=True, chunk_size=8
    )
    return -(size * (stats.logprob + 0.5 * stats.entropy)).sum()


def divergence(inputs, size: float) -> Tensor:
    hidden, weight, bias, targets = inputs
    live = targets != -100
    others = [x.detach().roll(1, -1) for x in (hidden, weight.flip(1))]
    values = fastrlhf.linear_kl_divergence(
        hidden, weight, *others, bias=bias, mask=live, chunk_size=8
    )
    return size * values.sum()


# The names are those of the plans of `fastrlhf/ops/linear_plans.py` that the losses take: P1 is
# KEEP_SLOPES, P2 WITH_LOSS of single tokens, P3 WITH_LOSS of groups of tokens, P4 RECOMPUTE.
LOSSES = {
    "P2": token_loss,
    "P2 with the lse": z_loss,
    "P3": group_loss,
    "P1 or P4": statistics,
    "divergence": divergence,
}


def gradients(loss, tensors, size: float, trained: bool) -> list[Tensor]:
    """Gradients of a loss that is as small as that where logits are differentiated, and is made
    large again afterwards.
    """
    leaves = tensors[:3] if trained else tensors[:1]
    held = [x.detach() for x in tensors[len(leaves) : 3]]
    total = loss((*leaves, *held, tensors[3]), size)
    return [x / size for x in autograd.grad(total, leaves)]


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Relative error of each row, or of a vector."""
    found, exact = (x.double().view(-1, x.shape[-1]) for x in (found, exact))
    return (found - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-300)


def ends_of_fp16(exact: Tensor) -> Tensor:
    """What the smallest number of fp16 is, of each row or of a vector."""
    smallest = torch.finfo(FP16).smallest_normal * torch.finfo(FP16).eps
    rows = exact.double().view(-1, exact.shape[-1])
    return smallest * rows.shape[1] ** 0.5 / rows.norm(dim=1).clamp(min=1e-300)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_operands_of_16_bits_cost_their_rounding(dtype, name, trained, like_a_gpu) -> None:
    tensors = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors[:3]]
    found = gradients(LOSSES[name], tensors, 1.0, trained)
    expected = gradients(LOSSES[name], (*exact, tensors[3]), 1.0, trained)
    # Once for the gradient of the logits, and once for the result.
    for a, b in zip(found, expected, strict=True):
        assert errors(a, b).max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_fisher_product_of_nearly_certain_tokens(dtype, like_a_gpu) -> None:
    hidden, weight, _, _ = (x.detach() for x in inputs(dtype))
    tangent = torch.randn_like(hidden)
    found, form = fastrlhf.linear_softmax_fisher_product(hidden, weight, tangent, chunk_size=8)
    exact = [x.double() for x in (hidden, weight, tangent)]
    product, quadratic = fastrlhf.linear_softmax_fisher_product(*exact)
    assert errors(found, product).max() < 2 * torch.finfo(dtype).eps
    assert errors(form, quadratic).max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["P2", "P2 with the lse", "P3"])
def test_fp16_holds_the_gradient_of_a_small_loss(name, trained, like_a_gpu) -> None:
    tensors = inputs(FP16)
    leaves = tensors[:3] if trained else tensors[:1]
    held = [x.detach() for x in tensors[len(leaves) : 3]]
    results = []
    for size in (1.0, 2.0**-13, 2.0**-40):
        loss = LOSSES[name]((*leaves, *held, tensors[3]), size)
        # As a gradient scaler does: when the loss is known already.
        results.append(autograd.grad(loss, leaves, torch.tensor(1 / size)))
    for usual, *small in zip(*results, strict=True):
        assert all(torch.equal(x, usual) for x in small)


@pytest.mark.parametrize("name", ["P1 or P4", "divergence"])
def test_fp16_holds_what_comes_of_a_small_upstream_gradient(name, like_a_gpu) -> None:
    tensors = inputs(FP16)
    usual = gradients(LOSSES[name], tensors, 1.0, trained=True)
    small = gradients(LOSSES[name], tensors, 2.0**-8, trained=True)
    # Their sizes are those of normal numbers, but not those of the gradients of the logits.
    for a, b in zip(small, usual, strict=True):
        assert (errors(a, b) < torch.finfo(FP16).eps + ends_of_fp16(2.0**-8 * b)).all()


def test_sums_over_tokens_of_very_different_weights_in_fp16(like_a_gpu, monkeypatch) -> None:
    """The unit of the sums grows from block to block, and what was added before goes with it."""
    monkeypatch.setattr(head_gradients, "_WAITING_BYTES", 0)
    hidden, weight, bias, targets = inputs(FP16)
    sizes = torch.logspace(-6, 5, TOKENS, base=10).view(targets.shape)

    def loss(hidden, weight, bias):
        return fastrlhf.linear_loss(
            lambda stats, size: -(stats.logprob * size).sum(), hidden, weight, targets, sizes,
            bias=bias, chunk_size=8,
        )[0]  # fmt: skip

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = autograd.grad(loss(*exact), exact)
    found = autograd.grad(loss(hidden, weight, bias), (hidden, weight, bias), torch.tensor(1e-3))
    for a, b in zip(found, expected, strict=True):
        bound = 2 * torch.finfo(FP16).eps + ends_of_fp16(1e-3 * b)
        assert (errors(a, 1e-3 * b) < bound).all()


@pytest.mark.parametrize("size", [2.0**-6, 2.0**6])
def test_tokens_of_small_weight_keep_their_places_in_a_sum_in_fp16(size, like_a_gpu) -> None:
    """Each token has an entry of its own, so that none is lost among larger ones."""
    head = Head([torch.randn(VOCAB, WIDTH, dtype=FP16)], torch.zeros(VOCAB), FP16)
    hidden = (size * torch.randn(TOKENS, WIDTH)).to(FP16)
    weights = torch.logspace(0, -7, TOKENS, base=10)
    d_logits = torch.zeros(TOKENS, VOCAB).index_put((torch.arange(TOKENS),) * 2, weights)
    gradients = head_gradients.Gradients(head, TOKENS, None, [True], True)
    operands = head_gradients.as_operands(d_logits, FP16, gradients.room(TOKENS))
    gradients.add(slice(0, TOKENS), hidden, operands)
    _, bias, total = gradients.totals(hidden, head.bias, head.weights)
    rounding = torch.finfo(FP16).eps
    assert errors(total[:TOKENS], hidden.double() * weights[:, None]).max() < rounding
    assert errors(bias[:TOKENS, None], weights[:, None].double()).max() < rounding


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_compiled_in_one_graph(dtype, trained, like_a_gpu, monkeypatch) -> None:
    def add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
        a, b = a.to(total.dtype), b.to(total.dtype)
        torch.addmm(total, a, b, beta=0 if fresh else 1, out=total)

    monkeypatch.setattr(linear_head, "_add_product", add_product)
    hidden, weight, _, targets = inputs(dtype)
    leaves = (hidden, weight) if trained else (hidden,)
    held = weight if trained else weight.detach()

    def loss() -> Tensor:
        return -fastrlhf.linear_token_logprobs(hidden, held, targets, chunk_size=8).sum()

    usual = autograd.grad(loss(), leaves)
    found = autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), leaves)
    for a, b in zip(found, usual, strict=True):
        assert errors(a, b.double()).max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_logits_wait_for_each_other(name, dtype, like_a_gpu, monkeypatch) -> None:
    tensors = inputs(dtype)
    alone, together = [], []
    for found, rows in ((alone, 0), (together, 16)):
        monkeypatch.setattr(head_gradients, "_WAITING_BYTES", 2 * VOCAB * rows)
        like_a_gpu.shapes.clear()
        found += [gradients(LOSSES[name], tensors, 1.0, trained=True), like_a_gpu.of_weight()]
    assert together[1] == (2 if name == "P3" else 3)
    assert alone[1] == (2 if name == "P3" else 5)
    for a, b in zip(alone[0], together[0], strict=True):
        assert errors(a, b.double()).max() < torch.finfo(dtype).eps


def test_what_waits_is_bounded(like_a_gpu, monkeypatch) -> None:
    head = Head([torch.randn(VOCAB, WIDTH, dtype=BF16)], None, BF16)
    monkeypatch.setattr(head_gradients, "_WAITING_BYTES", 2 * VOCAB * 30)
    for rows, wanted, room in ((1000, True, 24), (10, True, 10), (1000, False, 8)):
        gradients = head_gradients.Gradients(head, rows, None, [wanted], True)
        block = gradients.room(8)
        assert len(block) == 8 and block.untyped_storage().nbytes() == 2 * room * 1024
        assert block.data_ptr() % 16 == 0 and block.stride(0) == 1024


def test_blocks_are_whole_tiles_of_a_matmul() -> None:
    gpu = torch.device("cuda")
    for vocab in (32000, 50257, 128256, 151936):
        chunk = linear_rows.default_chunk(vocab, gpu)
        assert chunk % 128 == 0 and 2**29 - 4 * vocab * 128 < 4 * vocab * chunk <= 2**29
        spans = linear_rows.even_spans(5371, chunk)
        assert all((last - first) % 128 == 0 for first, last in spans[:-1])
        assert spans[0][0] == 0 and spans[-1][1] == 5371 and len(spans) == -(-5371 // chunk)
    assert linear_rows.default_chunk(2**25, gpu) == 4
    assert linear_rows.even_spans(250, 100) == [(0, 100), (100, 200), (200, 250)]


def test_a_gpu_takes_a_weight_in_large_slices() -> None:
    with FakeTensorMode():
        weight = torch.empty(128256, 4096, device="cuda")
        codes = torch.empty(128256, 2048, dtype=torch.uint8, device="cuda")
        table = torch.empty(16, device="cuda")
        quantized = QuantizedWeight(codes, table, 64, table, BF16)
        for of in (weight, quantized):
            assert Head([of], None, BF16).slice_rows * 4096 >= 2**26
        # They begin where rows of logits do.
        for width in (2560, 3072, 5120):
            rows = Head([torch.empty(128256, width, device="cuda")], None, BF16).slice_rows
            assert rows % 64 == 0 and (rows + 64) * width > 2**26
        assert Head([weight.to(BF16)], None, BF16).slice_rows == 128256


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("first", [0, 20, 40])
def test_blocks_without_any_gradient(dtype, first, like_a_gpu) -> None:
    """None has one, the first of two does, or both."""
    hidden, weight, bias, targets = inputs(dtype)
    counts = (torch.arange(TOKENS) < first).view(targets.shape)

    def found(targets: Tensor) -> tuple[Tensor, ...]:
        loss, _ = fastrlhf.linear_loss(
            lambda stats, counts: (counts * stats.logprob).sum(), hidden, weight, targets, counts,
            bias=bias, chunk_size=20,
        )  # fmt: skip
        return autograd.grad(loss, (hidden, weight, bias))

    for a, b in zip(found(targets), found(targets.masked_fill(~counts, -100)), strict=True):
        assert errors(a, b.double()).max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("waiting", [0, 30, 1000])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rows_without_a_gradient_are_not_multiplied(
    dtype, waiting, like_a_gpu, monkeypatch
) -> None:
    monkeypatch.setattr(head_gradients, "_WAITING_BYTES", 2 * VOCAB * waiting)
    hidden, weight, bias, targets = inputs(dtype)
    counts = torch.rand(targets.shape) < 0.5
    counts[1, 10:] = False

    def found(targets: Tensor, sizes: Tensor) -> list[Tensor]:
        like_a_gpu.shapes.clear()
        loss, _ = fastrlhf.linear_loss(
            lambda stats, size: -(size * stats.logprob).sum(), hidden, weight, targets, sizes,
            bias=bias, chunk_size=20,
        )  # fmt: skip
        return list(autograd.grad(loss, (hidden, weight, bias)))

    usual = found(targets.masked_fill(~counts, -100), torch.full(targets.shape, 1e-4))
    some = found(targets, counts * 1e-4)
    rows = sum(a[0] for a, b in like_a_gpu.shapes if b == (VOCAB, WIDTH))
    assert rows == int((counts & (targets != -100)).sum())
    for a, b in zip(some, usual, strict=True):
        assert errors(a, b.double()).max() < torch.finfo(dtype).eps
    assert torch.equal(some[0] == 0, usual[0] == 0)


# The loss of a chunk may be small, and made large again afterwards.
@pytest.mark.parametrize(("later", "size"), [(False, 1.0), (False, 1e-6), (True, 1.0)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_tokens_that_share_hidden_states(dtype, later, trained, size, like_a_gpu) -> None:
    """Several targets of a row whose gradient has 16 bits and begins at 16 bytes."""
    hidden, weight, bias, targets = inputs(dtype)
    weight, bias = (x.requires_grad_(trained) for x in (weight, bias))
    rows = torch.arange(TOKENS).view(targets.shape) // 2
    wanted = [hidden, weight, bias] if trained else [hidden]
    g = size * torch.randn(targets.shape)

    def gradients(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None) -> Tensor:
        options = {"bias": bias, "rows": rows, "chunk_size": 8}
        if later:
            logprobs = fastrlhf.linear_token_logprobs(hidden, weight, targets, **options)
            return (g.to(logprobs.dtype) * logprobs).sum()
        return fastrlhf.linear_loss(
            lambda stats, g: (g.to(stats.logprob.dtype) * stats.logprob).sum(), hidden, weight,
            targets, g, **options,
        )[0]  # fmt: skip

    loss = gradients(hidden.flatten(0, 1), weight, bias, rows)
    found = autograd.grad(loss, wanted, torch.tensor(1 / size))
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight, bias)]
    loss = gradients(exact[0].flatten(0, 1)[rows], exact[1], exact[2], None)
    of_exact = autograd.grad(loss / size, [x for x in exact if x.requires_grad])
    for a, b in zip(found, of_exact, strict=True):
        assert (a.double() - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()
