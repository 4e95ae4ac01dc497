"""What the backends of divergences do besides their numbers: graphs that compile whole, operators,
what kernels read and write, and what the eager backend holds.
"""

import pytest
import torch
from support.compare import assert_as_accurate
from support.divergence_formulas import BACKENDS, DTYPES, KINDS, MEASURES, random_pair
from torch import autograd

import fastrlhf


@BACKENDS
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.1"])
def test_a_training_step_compiles_whole(impl, measure, device) -> None:
    torch.compiler.reset()
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight, ref = torch.randn(37, 8, device=device), torch.randn(2, 3, 37, device=device)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=device)

    def step(hidden):
        values = fastrlhf.kl_divergence(
            hidden @ weight.T.to(hidden),
            ref.to(hidden),
            mask=mask,
            softcap=20.0,
            impl=impl,
            **MEASURES[measure],
        )
        return values.sum() / mask.sum()

    results = []
    for function, x in (
        (step, hidden),
        (torch.compile(step, fullgraph=True, backend="aot_eager"), hidden),
        (step, hidden.detach().double().requires_grad_()),
    ):
        loss = function(x)
        results.append((loss, *autograd.grad(loss, x)))
    for plain, compiled, exact in zip(*results, strict=True):
        assert_as_accurate(compiled, plain, exact)


@BACKENDS
@pytest.mark.parametrize("share", [None, 0.3])
def test_the_operators_pass_opcheck(impl, share, device) -> None:
    logits, ref = (x.requires_grad_() for x in random_pair(3, 20, device))
    mask = torch.tensor([True, False, True], device=device)
    own = torch.tensor([0.5, 1.0, 2.0], device=device)
    forward = torch.ops.fastrlhf.divergence.default
    backward = torch.ops.fastrlhf.divergence_backward.default
    transform = (own, 1.0, None, 0.5) if share is None else (None, 0.7, 5.0, 1.0)
    arguments = logits, ref, mask, *transform, share, impl
    torch.library.opcheck(forward, arguments)
    values, stats = (x.detach() for x in forward(*arguments))
    saved = logits.detach(), ref.detach(), mask, stats, values
    for of_p, dtype in ((True, torch.bfloat16), (False, None)):
        torch.library.opcheck(backward, (*saved, *transform, share, of_p, impl, dtype))


def test_auto_is_eager_on_the_cpu() -> None:
    logits, ref = random_pair(3, 50, "cpu")
    auto = fastrlhf.kl_divergence(logits, ref)
    assert torch.equal(auto, fastrlhf.kl_divergence(logits, ref, impl="eager"))
    reverse = fastrlhf.kl_divergence(logits, ref, direction="reverse", beta=0.1)
    assert torch.equal(auto, reverse)


needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter counts bytes on machines without a GPU"
)


def traffic_of(logits, ref, monkeypatch, *, g=None, **options):
    """Traffic of the forward and of the backward, and the gradients."""
    pytest.importorskip("triton", reason="needs triton")
    from support.traffic import counted_traffic

    with counted_traffic(monkeypatch) as forward:
        values = fastrlhf.kl_divergence(logits, ref, impl="triton", **options)
    wanted = [x for x in (logits, ref) if x.requires_grad]
    with counted_traffic(monkeypatch) as backward:
        gradients = autograd.grad(values, wanted, torch.ones_like(values) if g is None else g)
    return forward, backward, gradients


@needs_interpreter
@KINDS
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[4]])
def test_kernels_read_and_write_the_logits_as_often_as_they_must(
    measure, dtypes, monkeypatch
) -> None:
    reads = 2
    vocab = 2100
    for wanted in ((False, True), (True, True)):
        logits, ref = random_pair(2, vocab, "cpu", dtypes)
        logits.requires_grad_(wanted[0]), ref.requires_grad_(wanted[1])
        forward, backward, gradients = traffic_of(logits, ref, monkeypatch, **MEASURES[measure])
        assert forward.launches.total() == 1 and backward.launches.total() == sum(wanted)
        assert forward.stored() <= 2 * 7 * 4
        for x in (logits, ref):
            assert forward.loaded(x) == reads * x.nbytes
            assert backward.loaded(x) == sum(wanted) * x.nbytes
            assert backward.stored(x) == 0
        for gradient in gradients:
            assert backward.stored(gradient) == gradient.nbytes
            assert backward.loaded(gradient) == 0
        # Everything else, the mask and statistics, is small beside the logits.
        assert forward.loaded() <= reads * (logits.nbytes + ref.nbytes) + 2 * 20
        tiles = -(-vocab // 256)
        assert backward.loaded() <= sum(wanted) * (logits.nbytes + ref.nbytes + 2 * tiles * 40)


@needs_interpreter
@pytest.mark.parametrize("measure", ["reverse", "jsd 0.5"])
def test_masked_rows_and_those_without_an_upstream_gradient_are_not_read(
    measure, monkeypatch
) -> None:
    logits, ref = (x.requires_grad_() for x in random_pair(6, 1000, "cpu"))
    mask, g = torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 0.0])
    forward, backward, gradients = traffic_of(
        logits, ref, monkeypatch, g=g, mask=mask, **MEASURES[measure]
    )
    row = 1000 * 4
    for x in (logits, ref):
        assert forward.loaded(x) == 2 * 4 * row
        assert backward.loaded(x) == 2 * 2 * row
    for gradient in gradients:
        assert backward.stored(gradient) == gradient.nbytes
        assert gradient.any(-1).tolist() == [True, False, False, True, False, False]


@needs_interpreter
def test_a_frozen_reference_costs_no_launch_and_launches_do_not_grow_with_rows(monkeypatch) -> None:
    for rows in (1, 7):
        logits, ref = random_pair(rows, 100, "cpu")
        forward, backward, _ = traffic_of(logits.requires_grad_(), ref, monkeypatch)
        assert forward.launches.total() == backward.launches.total() == 1


def test_the_eager_backend_works_on_a_bounded_number_of_rows(monkeypatch) -> None:
    held = []
    for name in ("divergence_and_stats", "divergence_backward"):
        function = getattr(fastrlhf.reference, name)

        def call(x, *args, function=function, **kwargs):
            held.append(x.numel())
            return function(x, *args, **kwargs)

        monkeypatch.setattr(fastrlhf.reference, name, call)
    logits = torch.randn(90, 20000).bfloat16().requires_grad_()
    mask = torch.arange(90) % 3 > 0
    ref = torch.randn(1, 20000).bfloat16().expand(90, -1)
    fastrlhf.kl_divergence(logits, ref, mask=mask, impl="eager").sum().backward()
    assert len(held) == 2 * 2 and max(held) <= 2**20
    assert sum(held) == 2 * 60 * 20000
