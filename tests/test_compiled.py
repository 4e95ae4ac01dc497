"""The compiled backend: when it is chosen, what it compiles, what it holds, and what it falls back
on. That its numbers are right is tested where those of the other backends are.
"""

import logging

import pytest
import torch
from support.compare import budget, relative_error
from support.compiled_steps import VOCAB, batch, graphs, step, told, uncompiled
from torch import Tensor

import fastrlhf
from fastrlhf.ops import backend, compiled, compiled_rows
from fastrlhf.recipes.memory import peak_memory

pytestmark = pytest.mark.skipif(
    not compiled.compiler_is_there(),
    reason="needs a C++ compiler (CXX names one) and vector instructions",
)


@pytest.fixture(autouse=True)
def _same_backend_afterwards():
    before = backend._chosen
    yield
    backend._chosen = before


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """Numbers of the rows that the compiled statistics are asked for."""
    numbers: list[Tensor] = []
    function = compiled_rows.ROW_PARTS

    def recorded(matrix, rows, *others, **options):
        numbers.append(rows)
        return function(matrix, rows, *others, **options)

    monkeypatch.setattr(compiled_rows, "ROW_PARTS", recorded)
    return numbers


def test_auto_takes_it_on_a_cpu_where_the_problem_is_large(calls, monkeypatch) -> None:
    logits, targets = batch(6)
    step(logits, targets)
    assert not calls
    monkeypatch.setattr(backend, "_WORTH_COMPILING", logits.numel())
    step(logits, targets)
    assert len(calls) == 1
    monkeypatch.setattr(backend, "compiler_is_there", lambda: False)
    step(logits, targets)
    step(logits, targets, impl="eager")
    assert len(calls) == 1


def test_hidden_states_choose_by_all_their_tokens(calls, monkeypatch) -> None:
    hidden, weight, targets = torch.randn(20, 8), torch.randn(VOCAB, 8), torch.arange(20)
    monkeypatch.setattr(backend, "_WORTH_COMPILING", 20 * VOCAB)
    fastrlhf.linear_token_logprobs(hidden, weight, targets, chunk_size=7)
    assert [len(rows) for rows in calls] == [7, 7, 6]
    fastrlhf.linear_token_logprobs(hidden[1:], weight, targets[1:], chunk_size=7)
    assert len(calls) == 3


def test_the_backend_of_the_process_and_of_the_environment(calls, monkeypatch) -> None:
    logits, targets = batch(3)
    assert fastrlhf.get_backend() == "auto"
    monkeypatch.setenv("FASTRLHF_BACKEND", "compiled")
    assert fastrlhf.get_backend() == "compiled"
    step(logits, targets)
    assert len(calls) == 1
    fastrlhf.set_backend("eager")
    assert fastrlhf.get_backend() == "eager"
    step(logits, targets)
    assert len(calls) == 1
    step(logits, targets, impl="compiled")  # named in the call, it is taken
    assert len(calls) == 2
    fastrlhf.set_backend("auto")
    step(logits, targets)
    assert len(calls) == 2


@pytest.mark.parametrize("wrong, error", [("cuda", ValueError), (None, TypeError)])
def test_an_unknown_backend_is_refused(wrong, error) -> None:
    with pytest.raises(error, match=r"^backend: expected"):
        fastrlhf.set_backend(wrong)


def test_an_unknown_backend_in_the_environment_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("FASTRLHF_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^FASTRLHF_BACKEND: expected"):
        step(*batch(3))


def test_no_size_is_compiled_anew(caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO, "fastrlhf")
    for name in ("ROW_PARTS", "LOGITS_GRADIENT"):  # this process may have compiled them before
        monkeypatch.setattr(compiled_rows, name, uncompiled(getattr(compiled_rows, name)))
    dtype = torch.float64
    step(*batch(5, dtype=dtype), impl="compiled")
    before = graphs()
    assert [line.split(" in ")[0] for line in told(caplog)] == [
        "compiled row_parts", "compiled logits_gradient"
    ]  # fmt: skip
    for rows, vocab in [(1, VOCAB), (2, 2), (2, 3), (300, 300), (7, 1000), (1, 33), (2, 5000)]:
        logits, targets = batch(rows, vocab, dtype)
        for ignored in (0, rows // 2, rows - 1):
            some = targets.clone()
            some[:ignored] = -100
            found = step(logits, some, impl="compiled")
            expected = step(logits, some, impl="eager")
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for options in ({"temperature": 0.5}, {"softcap": 3.0}):
        step(*batch(5, dtype=dtype), impl="compiled", **options)
        after = graphs()
        for value in (0.7, 2.0, 30.0):
            step(*batch(9, dtype=dtype), impl="compiled", **dict.fromkeys(options, value))
        assert graphs() == after
    assert graphs() == before + 4
    assert len(told(caplog)) == 2 + 4


@pytest.mark.parametrize("runs", [0, 1, 3])
@pytest.mark.parametrize("left", [0, 1, 37])
def test_sums_are_of_all_columns(runs, left) -> None:
    vocab = max(2, runs * compiled_rows._RUN + left)
    logits, other = (5 * torch.randn(4, vocab) for _ in range(2))
    targets = torch.randint(vocab, (4,))
    asked = {"entropy": True, "with_stats": ("mean_logit", "log_sum_sq_probs")}
    for found in (
        lambda impl: fastrlhf.token_stats(logits, targets, impl=impl, **asked),
        lambda impl: (fastrlhf.kl_divergence(logits, other, impl=impl),),
        lambda impl: fastrlhf.softmax_fisher_product(logits, other, impl=impl),
        lambda impl: fastrlhf.softmax_fisher_product(logits, other + 30, impl=impl),
        lambda impl: fastrlhf.softmax_fisher_product(0 * logits, 1e18 * other, impl=impl),
    ):
        for a, b in zip(found("compiled"), found("eager"), strict=True):
            if a is not None:
                assert relative_error(a, b) <= 1e-5


def test_sums_of_many_equal_numbers_do_not_drift() -> None:
    logits = torch.full((2, 120_000), -0.7)
    logits[:, 0] = 0.0
    other = logits.clone()
    other[:, 1::2] += 3.0
    targets = torch.zeros(2, dtype=torch.int64)
    for found in (
        lambda dtype, impl: (
            fastrlhf.token_stats(logits.to(dtype), targets, impl=impl).lse.double().exp()
        ),
        lambda dtype, impl: fastrlhf.kl_divergence(
            logits.to(dtype), other.to(dtype), direction="jsd", impl=impl
        ),
    ):
        exactly = found(torch.float64, "eager")
        plain = relative_error(found(torch.float32, "eager"), exactly)
        ours = relative_error(found(torch.float32, "compiled"), exactly)
        assert ours <= budget(plain, torch.float32)


@pytest.mark.parametrize("mask", ["1111000111", "0111001110", "1000000000", "0000000000"])
def test_gradients_of_spans_of_rows_are_where_they_belong(mask, monkeypatch) -> None:
    monkeypatch.setattr(compiled_rows, "_WORTH_A_CALL", 1)
    keep = torch.tensor([[digit == "1" for digit in mask]])
    logits, other = (torch.randn(1, len(mask), VOCAB, requires_grad=True) for _ in range(2))
    found = {}
    for impl in ("compiled", "eager"):
        kl = fastrlhf.kl_divergence(logits, other, mask=keep, impl=impl)
        product = fastrlhf.softmax_fisher_product(logits, other, mask=keep, impl=impl)
        found[impl] = (*torch.autograd.grad(kl.sum(), (logits, other)), *product)
    for a, b in zip(found["compiled"], found["eager"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", [0.1, 0.5, 1.2])  # KL 0.005, 0.12, 0.7
def test_small_divergences_are_more_accurate_than_the_plain_formula(distance) -> None:
    p = 2 * torch.randn(16, 32000)
    q = p + distance * torch.randn(16, 32000)

    def plainly(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    exact = plainly(p.double(), q.double())
    plain = relative_error(plainly(p, q), exact)
    found = relative_error(fastrlhf.kl_divergence(p, q, impl="compiled"), exact)
    assert found <= plain / 4


def test_rows_without_a_target_are_not_asked_for(calls) -> None:
    logits, targets = batch(8)
    targets[::3] = -100
    with torch.no_grad():
        logits[::3] = torch.nan
    logprobs, gradient = step(logits, targets, impl="compiled")
    assert [rows.tolist() for rows in calls] == [[1, 2, 4, 5, 7]]
    assert logprobs[::3].eq(0).all() and gradient[::3].eq(0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_held_is_the_gradient_and_a_bounded_rest(inplace) -> None:
    logits, targets = batch(1200, 20000, torch.bfloat16)
    targets[::7] = -100
    options = {"impl": "compiled", "inplace_backward": inplace}

    def work() -> None:
        fastrlhf.token_logprobs(logits.view_as(logits), targets, **options).sum().backward()

    work()
    logits.grad = None
    _, peak = peak_memory(work, torch.device("cpu"))
    assert peak <= 2**20 + (0 if inplace else 2 * logits.numel())


@pytest.mark.parametrize("one_loop", [True, False])
@pytest.mark.parametrize("live", [0, 1, 2, 5, 7])
def test_a_gradient_takes_the_place_of_its_logits(live, one_loop, monkeypatch) -> None:
    room, by_way_of_room = [], compiled_rows._by_way_of_room

    def recorded(*given) -> None:
        room.append(given)
        by_way_of_room(*given)

    monkeypatch.setattr(compiled_rows, "_by_way_of_room", recorded)
    monkeypatch.setattr(compiled_rows, "_CHUNK_LOGITS", 3 * VOCAB)
    if not one_loop:
        function = uncompiled(compiled_rows.LOGITS_GRADIENT)
        monkeypatch.setattr(compiled_rows, "LOGITS_GRADIENT", function)
        monkeypatch.setattr(compiled.RowFunction, "_is_one_loop", lambda *_: False)
    logits, targets = batch(9)
    targets[live:] = -100
    targets = targets.roll(1)
    _, expected = step(logits, targets, impl="compiled")
    copies = 1.0 * logits
    logprobs = fastrlhf.token_logprobs(copies, targets, inplace_backward=True, impl="compiled")
    (found,) = torch.autograd.grad(logprobs.sum(), copies)
    assert torch.equal(found, expected) and found.data_ptr() == copies.data_ptr()
    lone_chunks, chunks = int(live % 3 == 1), -(-live // 3)
    assert len(room) == (lone_chunks if one_loop else chunks)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_is_left_when_a_function_is_there_no_longer_is_done_eagerly(
    after, inplace, monkeypatch
) -> None:
    logits, targets = batch(8)
    expected = step(logits, targets, impl="eager")[1]
    monkeypatch.setattr(compiled_rows, "_CHUNK_LOGITS", 3 * VOCAB)
    function, calls = compiled_rows.LOGITS_GRADIENT, []

    def for_a_while(*given, **options):
        calls.append(1)
        if len(calls) > after:
            raise compiled.NotCompiled
        return function(*given, **options)

    monkeypatch.setattr(compiled_rows, "LOGITS_GRADIENT", for_a_while)
    copies = 1.0 * logits
    logprobs = fastrlhf.token_logprobs(copies, targets, inplace_backward=inplace, impl="compiled")
    torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), copies)[0], expected)
    assert len(calls) == after + 1


def test_what_cannot_be_done_twice_is_not(monkeypatch) -> None:
    monkeypatch.setattr(compiled_rows, "_ROOM_LOGITS", VOCAB)
    rows, calls = torch.zeros(1, 3, VOCAB), []

    def write(out: Tensor, some: Tensor) -> None:
        calls.append(some)
        if len(calls) == 2:
            raise compiled.NotCompiled
        out.fill_(1.0)

    with pytest.raises(RuntimeError, match=r"turned off during a call$"):
        compiled_rows._by_way_of_room(rows, torch.arange(3), write)


def test_a_function_that_reads_what_it_has_written_writes_elsewhere() -> None:
    def mixed(out: Tensor, places: Tensor, matrix: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        rows = matrix[numbers]
        out[places] = rows - rows.mean(-1, keepdim=True) + rows.flip(-1)
        return ()

    function = compiled.RowFunction(mixed, "MV n mv n")
    matrix, numbers = torch.randn(5, 300), torch.arange(5)
    with pytest.raises(compiled.NotInPlace):
        function(matrix, numbers, matrix, numbers)
    out = torch.empty(5, 300)
    function(out, numbers, matrix, numbers)
    torch.testing.assert_close(out, matrix - matrix.mean(-1, keepdim=True) + matrix.flip(-1))


def test_divergence_and_fisher_product_hold_a_bounded_rest_too(monkeypatch) -> None:
    logits, other = (batch(600, 20000, torch.bfloat16)[0] for _ in range(2))
    size = 2 * logits.numel()

    def divergence() -> None:
        fastrlhf.kl_divergence(logits, other.detach(), impl="compiled").sum().backward()

    def product() -> None:
        fastrlhf.softmax_fisher_product(logits.detach(), other.detach(), impl="compiled")

    monkeypatch.setattr(compiled_rows, "_HELD_NUMBERS", 2**18)
    for work in (divergence, product):
        work()
        logits.grad = None
        _, peak = peak_memory(work, torch.device("cpu"))
        assert peak <= size + 3 * 4 * 2**18


def test_code_for_other_vectors_is_kept_apart(monkeypatch) -> None:
    from torch.compiler import config

    tags = {config.cache_key_tag}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda is_=capability: is_)
        with compiled._plainly():
            tags.add(config.cache_key_tag)
    assert len(tags) == 3


def test_gradients_find_columns_at_any_distance() -> None:
    logits, targets = torch.randn(4, 50), torch.arange(4)
    stats = torch.ops.fastrlhf.token_stats(
        logits, targets, None, 1.0, None, 1.0, -100, False, False, "eager"
    )
    written = []
    for impl in ("eager", "compiled"):
        out = torch.full((50, 4), torch.nan).t()
        torch.ops.fastrlhf.token_stats_backward_into(
            out, logits, targets, stats[0], stats[1], *stats[3:], torch.ones(4), None, None,
            1.0, None, 1.0, impl,
        )  # fmt: skip
        written.append(out)
    torch.testing.assert_close(*written)


def test_a_graph_of_hidden_states_is_whole_where_it_pays(calls, monkeypatch) -> None:
    hidden, weight, targets = torch.randn(20, 8), torch.randn(VOCAB, 8), torch.arange(20)
    monkeypatch.setattr(backend, "_WORTH_COMPILING", 20 * VOCAB)
    function = torch.compile(fastrlhf.linear_token_logprobs, fullgraph=True, backend="eager")
    found = function(hidden, weight, targets)
    assert calls
    torch.testing.assert_close(found, fastrlhf.linear_token_logprobs(hidden, weight, targets))


@pytest.mark.parametrize("impl", ["eager", "compiled", "triton"])
def test_a_token_without_probability_is_no_infinite_distance(impl, device) -> None:
    # e^-100 is a number of fp32, but not once it is divided by the 999 others.
    logits = torch.zeros(1, 1000, device=device)
    logits[0, 7] = -100.0
    ref = logits.clone()
    ref[0, 7] = -torch.inf
    sides = logits.requires_grad_(), ref.requires_grad_()
    value = fastrlhf.kl_divergence(*sides, impl=impl)
    assert value.abs().item() < 1e-6
    for gradient in torch.autograd.grad(value.sum(), sides):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("choose", ["set_backend", "environment"])
def test_triton_for_all_is_for_where_it_runs(choose, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if choose == "set_backend":
        fastrlhf.set_backend("triton")
    else:
        monkeypatch.setenv("FASTRLHF_BACKEND", "triton")
    logits, targets = batch(3)
    found, expected = step(logits, targets), step(logits, targets, impl="eager")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"^impl: "):
        step(logits, targets, impl="triton")
