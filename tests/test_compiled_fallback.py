"""The compiled backend where there is no compiler, where one fails or is turned off, and while it
warms up: what it falls back on, and what it says.
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
from support.compiled_steps import VOCAB, batch, graphs, step, told, uncompiled

import fastrlhf
from fastrlhf.ops import backend, compiled, compiled_rows

pytestmark = pytest.mark.skipif(
    not compiled.compiler_is_there(),
    reason="needs a C++ compiler (CXX names one) and vector instructions",
)


@pytest.fixture(autouse=True)
def _same_backend_afterwards():
    before = backend._chosen
    yield
    backend._chosen = before


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
