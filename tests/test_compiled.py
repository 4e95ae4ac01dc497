"""The compiled backend: when it is chosen, what it compiles, what it holds, and what it falls back
on. That its numbers are right is tested where those of the other backends are.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
from importlib import import_module

import pytest
import torch
from support.compare import budget, relative_error
from torch import Tensor
from torch._dynamo.utils import counters

import fastrlhf
from fastrlhf.ops import backend, compiled, compiled_rows
from fastrlhf.recipes.memory import peak_memory

pytestmark = pytest.mark.skipif(
    not compiled.compiler_is_there(),
    reason="needs a C++ compiler (CXX names one) and vector instructions",
)

VOCAB = 300


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


def batch(rows: int, vocab: int = VOCAB, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, vocab).to(dtype).requires_grad_(), torch.randint(vocab, (rows,))


def step(logits: Tensor, targets: Tensor, **options) -> tuple[Tensor, Tensor]:
    logprobs = fastrlhf.token_logprobs(logits, targets, **options)
    return logprobs.detach(), torch.autograd.grad(logprobs.sum(), logits)[0]


def told(caplog) -> list[str]:
    """What this library logged."""
    return [record.getMessage() for record in caplog.records if record.name == "fastrlhf"]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


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


def test_no_size_is_compiled_anew(caplog) -> None:
    caplog.set_level(logging.INFO, "fastrlhf")
    dtype = torch.float64  # which nothing else here uses
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


def uncompiled(function: compiled.RowFunction) -> compiled.RowFunction:
    return compiled.RowFunction(function.function, " ".join(function.dimensions))


def test_without_a_compiler_it_is_the_eager_backend(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "compiler_is_there", lambda: False)
    for name in ("ROW_PARTS", "LOGITS_GRADIENT"):
        monkeypatch.setattr(compiled_rows, name, uncompiled(getattr(compiled_rows, name)))
    logits, targets = batch(4)
    found, expected = (step(logits, targets, impl=impl) for impl in ("compiled", "eager"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_without_a_compiler_there_is_nothing_to_warm_up(monkeypatch) -> None:
    module = import_module("fastrlhf.ops.warm_up")
    monkeypatch.setattr(module, "compiler_is_there", lambda: False)
    with pytest.raises(RuntimeError, match=r"^warm_up: found no C\+\+ compiler"):
        fastrlhf.warm_up()


def test_what_does_not_compile_runs_eagerly_and_says_so_once(monkeypatch, caplog) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("no such instruction\nand more")

    logits, targets = batch(4)
    step(logits, targets, impl="compiled")
    caplog.clear()
    monkeypatch.setattr(compiled_rows, "LOGITS_GRADIENT", uncompiled(compiled_rows.LOGITS_GRADIENT))
    monkeypatch.setattr(torch, "compile", broken)
    for _ in range(2):
        _, gradient = step(logits, targets, impl="compiled")
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 1
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["logits_gradient is not compiled, and runs eagerly: no such instruction"]


def test_nothing_is_compiled_under_a_mode_that_watches_operations() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    found = compiled_rows.NORM
    with Watch(), pytest.raises(compiled.NotCompiled):
        found(torch.zeros(3, 5), torch.arange(3), None, None, None, dtype=torch.float32)
    logits, targets = batch(4)
    expected = step(logits, targets, impl="compiled")
    with Watch():
        logprobs, gradient = step(logits, targets, impl="compiled")
    torch.testing.assert_close(logprobs, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_no_state_is_compiled_anew() -> None:
    logits, targets = batch(40)
    expected, before = step(logits, targets, impl="compiled"), graphs()
    with torch.autocast("cpu", torch.bfloat16):
        found = step(logits, targets, impl="compiled")
    with torch.inference_mode():
        inferred = fastrlhf.token_logprobs(logits, targets, impl="compiled")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again = step(logits, targets, impl="compiled")
    finally:
        torch.set_num_threads(threads)
    assert graphs() == before
    for value, want in zip(
        (*found, *again, inferred), (*expected, *expected, expected[0]), strict=True
    ):
        assert torch.equal(value, want)


def test_what_the_compiler_forgets_is_compiled_from_the_example(caplog) -> None:
    caplog.set_level(logging.INFO, "fastrlhf")
    logits, targets = batch(40)
    expected = step(logits, targets, impl="compiled")
    caplog.clear()
    torch._dynamo.reset()
    found = step(logits, targets, impl="compiled")
    assert len(told(caplog)) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    step(*batch(3), impl="compiled")
    assert len(told(caplog)) == 2


def test_a_compiler_that_is_turned_off_is_none(monkeypatch, caplog) -> None:
    monkeypatch.setattr(compiled_rows, "ROW_PARTS", uncompiled(compiled_rows.ROW_PARTS))
    logits, targets = batch(4)
    with torch.compiler.set_stance("force_eager"):
        logprobs = fastrlhf.token_logprobs(logits, targets, impl="compiled")
    assert torch.equal(logprobs, fastrlhf.token_logprobs(logits, targets, impl="eager"))
    assert told(caplog) == ["row_parts is not compiled, and runs eagerly: PyTorch's compiler is "
                            "turned off"]  # fmt: skip


def test_a_compiler_that_was_turned_off_is_asked_again(monkeypatch) -> None:
    monkeypatch.setattr(compiled_rows, "NORM", uncompiled(compiled_rows.NORM))
    rows = torch.randn(3, 50), torch.arange(3), None, None, None
    for off in (
        lambda: torch.compiler.set_stance("force_eager"),
        lambda: torch.compiler.set_stance("default", force_backend="eager"),
        lambda: torch._dynamo.config.patch(disable=True),
    ):
        with off(), pytest.raises(compiled.NotCompiled):
            compiled_rows.NORM(*rows, dtype=torch.float32)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            peak, log_norm = compiled_rows.NORM(*rows, dtype=torch.float32)
        torch.testing.assert_close(peak + log_norm, rows[0].logsumexp(-1))
    for off in (
        lambda: torch.compiler.set_stance("force_eager"),
        lambda: torch.compiler.set_stance("default", force_backend="eager"),
    ):
        with off(), pytest.raises(compiled.NotCompiled):
            compiled_rows.NORM(*rows, dtype=torch.float32)


def test_a_compiler_that_was_turned_off_meanwhile_is_asked_again(monkeypatch) -> None:
    monkeypatch.setattr(compiled_rows, "NORM", uncompiled(compiled_rows.NORM))
    rows = torch.randn(3, 50), torch.arange(3), None, None, None
    compile_it = torch.compile

    def turned_off(*arguments, **options):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        return compile_it(*arguments, **options)

    with contextlib.ExitStack() as stack, monkeypatch.context() as patched:
        patched.setattr(torch, "compile", turned_off)
        with pytest.raises(compiled.NotCompiled):
            compiled_rows.NORM(*rows, dtype=torch.float32)
    compiled_rows.NORM(*rows, dtype=torch.float32)


def test_warming_up_fails_where_the_compiler_does(monkeypatch) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("C++ compile error\n\nOutput:\nx.cpp:1: fatal error: no Python.h")

    for name in ("ROW_PARTS", "LOGITS_GRADIENT"):
        monkeypatch.setattr(compiled_rows, name, uncompiled(getattr(compiled_rows, name)))
    turned_off = r"^row_parts cannot be compiled: PyTorch's compiler is turned off$"
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=turned_off):
        fastrlhf.warm_up()
    with torch.device("cpu"), pytest.raises(RuntimeError, match=r"^advantages cannot .* at work$"):
        fastrlhf.warm_up(operations=("gae",))
    monkeypatch.setattr(torch, "compile", broken)
    fastrlhf.token_logprobs(*batch(4), impl="compiled")  # eagerly
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"compiled: C.. compile error; .*no Python.h$"):
            fastrlhf.warm_up()


def test_warming_up_is_of_fp32_and_of_backwards_whatever_the_state(monkeypatch) -> None:
    for name in ("ROW_PARTS", "LOGITS_GRADIENT", "ADVANTAGES"):
        monkeypatch.setattr(compiled_rows, name, uncompiled(getattr(compiled_rows, name)))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            fastrlhf.warm_up(operations=("token_stats", "gae"), impl="auto")
    finally:
        torch.set_default_dtype(default)
    before = graphs()
    step(*batch(3), impl="compiled")
    zeros = torch.zeros(2, 5)
    fastrlhf.gae(zeros, zeros, torch.ones(2, 5), impl="compiled")
    assert graphs() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
def test_as_many_threads_work_as_there_are_when_it_runs() -> None:
    script = """
import os, torch
from fastrlhf.ops.compiled_rows import NORM

def threads(many):
    torch.set_num_threads(many)
    NORM(torch.zeros(8, 50), torch.arange(8), None, None, None, dtype=torch.float32)
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
NORM(torch.zeros(8, 50), torch.arange(8), None, None, None, dtype=torch.float32)
one, three = threads(1), threads(3)
assert three == one + 2, (one, three)
"""
    # No processes that compile, with threads to watch them.
    alone = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_while_another_thread_compiles_this_one_checks_and_computes_as_ever() -> None:
    started, done = threading.Event(), threading.Event()

    def slow(graph, example):
        started.set()
        assert done.wait(60)
        return graph

    def compile_slowly() -> None:
        torch.compile(lambda x: x + 1, backend=slow)(torch.zeros(3))

    logits, targets = batch(1)
    expected = step(logits, targets, impl="eager")
    thread = threading.Thread(target=compile_slowly)
    thread.start()
    try:
        assert started.wait(60)
        with pytest.raises(ValueError, match=r"^targets"):
            fastrlhf.token_logprobs(logits, targets + VOCAB)
        found = step(logits, targets, impl="eager")
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_traced_call_runs_eagerly() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    logits, targets = torch.randn(4, VOCAB), torch.arange(4)
    expected = fastrlhf.token_logprobs(logits, targets, impl="compiled")
    traced = make_fx(lambda x: fastrlhf.token_logprobs(x, targets, impl="compiled"))(logits)
    assert torch.equal(traced(logits), expected)


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


def test_warming_up_leaves_nothing_to_compile(caplog) -> None:
    options = {"temperature": 0.9, "softcap": 20.0}
    operations = ("token_stats", "kl_divergence", "softmax_fisher_product", "gae")
    seconds = fastrlhf.warm_up(torch.float16, operations=operations, entropy=True, **options)
    assert seconds > 0
    caplog.set_level(logging.INFO, "fastrlhf")
    logits, targets = batch(9, dtype=torch.float16)
    stats = fastrlhf.token_stats(logits, targets, entropy=True, impl="compiled", **options)
    (stats.logprob + stats.entropy).sum().backward()
    other = torch.randn(9, VOCAB).half().requires_grad_()
    fastrlhf.kl_divergence(logits, other, impl="compiled", **options).sum().backward()
    fastrlhf.softmax_fisher_product(logits, other, temperature=0.9, impl="compiled")
    tokens = torch.randn(3, 50)
    fastrlhf.gae(tokens, tokens, torch.ones(3, 50), impl="compiled")
    assert not told(caplog)
    assert fastrlhf.warm_up(torch.float16, entropy=True, **options) < seconds
    with pytest.raises(ValueError, match=r"^operations: expected"):
        fastrlhf.warm_up(operations=("dpo",))


def test_small_problems_load_no_compiler() -> None:
    code = (
        "import sys, torch, fastrlhf\n"
        "x = torch.randn(4, 50, requires_grad=True)\n"
        "fastrlhf.token_logprobs(x, torch.arange(4)).sum().backward()\n"
        "assert 'torch._inductor.codecache' not in sys.modules\n"
    )
    environment = {name: x for name, x in os.environ.items() if name != "FASTRLHF_BACKEND"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
