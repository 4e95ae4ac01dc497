"""First light: that its comparisons can fail, that its sections end alone, and, interpreted and in
tiny shapes, that every line of it runs.
"""

import importlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

accuracy, cases, from_hidden, from_logits, machines, results = (
    importlib.import_module(f"first_light.{name}")
    for name in ("accuracy", "cases", "from_hidden", "from_logits", "machine", "results")
)
MACHINE = machines.make_machine("cpu", tiny=True)


# Comparisons that can fail.


class Found(importlib.import_module("first_light.sections").Reporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.passed = {}

    def check(self, name, verdict) -> None:
        self.passed[name] = verdict.passed

    def holds(self, name, condition) -> None:
        self.passed[name] = condition

    @property
    def failed(self) -> list[str]:
        return [name for name, passed in self.passed.items() if not passed]


def comparison(ours, plain, case, wanted) -> Found:
    found = Found()
    cases.compare(found, MACHINE, "x", (ours, plain), case, wanted)
    return found


class _Changed(torch.autograd.Function):
    """The identity, whose gradient is another one."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def with_gradient(plain, leaf, change):
    """A formula with a changed gradient of one leaf."""
    return lambda x, s: plain(x | {leaf: _Changed.apply(x[leaf], change)}, s)


def of_targets(gradient, targets, factor):
    index = targets.clamp(min=0)[..., None]
    return (gradient * factor).scatter(-1, index, gradient.gather(-1, index))


OPERATIONS = from_logits.STATISTICS | from_logits.POLICIES | from_logits.DIVERGENCES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_wrong_gradient_of_logits_fails(name, dtype) -> None:
    operation = OPERATIONS[name]
    case = from_logits.make_case(MACHINE, operation, 200, dtype).clean()
    targets, wanted = case.tokens.targets, tuple(case.leaves)
    assert not comparison(operation.plain, operation.plain, case, wanted).failed
    mutants = {
        "none": lambda g: 0 * g,
        "the targets' alone": lambda g: of_targets(g, targets, 0.0),
        "2% too much of the rest": lambda g: of_targets(g, targets, 1.02),
        "2% too little": lambda g: 0.98 * g,
        "not a number": lambda g: g * torch.nan,
        "one where ignored": lambda g: g + (targets < 0)[..., None] * 1e-3,
        "half of a row": lambda g: g * (torch.arange(g.shape[-1]) < 100),
    }
    for mutant, change in mutants.items():
        for leaf in wanted:
            wrong = with_gradient(operation.plain, leaf, change)
            failed = comparison(wrong, operation.plain, case, wanted).failed
            assert failed and all(leaf in title or "again" in title for title in failed), mutant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_wrong_gradient_from_hidden_states_fails(dtype) -> None:
    operation, wanted = from_hidden.OPERATIONS["linear_token_logprobs"], ("hidden", "weight")
    case = cases.hidden_case(MACHINE, 200, dtype)
    targets = case.tokens.targets
    assert not comparison(operation.plain, operation.plain, case, wanted).failed
    chosen = torch.zeros(200, 1).index_fill(0, targets[targets >= 0], 1.0).to(dtype)
    for leaf, change in (
        ("hidden", lambda g: 0 * g),
        ("hidden", lambda g: 0.9 * g),
        ("weight", lambda g: 0 * g),
        ("weight", lambda g: g * chosen),
        ("weight", lambda g: g * (1 - chosen)),
        ("weight", lambda g: g * (torch.arange(200) < 150)[:, None]),
    ):
        wrong = with_gradient(operation.plain, leaf, change)
        failed = comparison(wrong, operation.plain, case, wanted).failed
        assert any(f"gradient of {leaf}" in title for title in failed)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("change", [lambda x: 1.001 * x, lambda x: x * torch.nan, torch.zeros_like])
def test_a_wrong_value_fails(name, change) -> None:
    operation = OPERATIONS[name]
    case = from_logits.make_case(MACHINE, operation, 200, torch.float32).clean()

    def wrong(x, s):
        # The difference is a constant: its gradient is right.
        return {k: v + (change(v) - v).detach() for k, v in operation.plain(x, s).items()}

    failed = comparison(wrong, operation.plain, case, tuple(case.leaves)).failed
    assert any(title in ("x: logprob", "x: loss", "x: divergence") for title in failed)


def test_a_single_wrong_log_prob_fails() -> None:
    exact = torch.linspace(-15, -5, 50).double()
    plain, found = exact.float(), exact.float()
    assert accuracy.judge_values(found, plain, exact, 4e-6).passed
    found[20] += 1e-3
    assert not accuracy.judge_values(found, plain, exact, 4e-6).passed


def test_an_operation_that_raises_or_differs_from_run_to_run_fails() -> None:
    operation = OPERATIONS["token_logprobs"]
    case = from_logits.make_case(MACHINE, operation, 200, torch.float32).clean()

    def fail(x, s):
        raise RuntimeError("no such kernel\nand more")

    failed = comparison(fail, operation.plain, case, ("logits",)).failed
    assert failed == ["x: RuntimeError: no such kernel"]
    noise = iter([0.0, 1e-7])

    def noisy(x, s):
        return {"logprob": operation.plain(x, s)["logprob"] * (1 + next(noise))}

    failed = comparison(noisy, operation.plain, case, ("logits",)).failed
    assert failed == ["x, again: same bits"]


def test_a_plain_formula_that_is_wrong_allows_nothing() -> None:
    exact = torch.randn(3, 100).double()
    found, lost = 0.8 * exact.float(), torch.zeros(3, 100)
    assert not accuracy.judge(found, lost, exact, 1e-6).passed
    assert not accuracy.judge(found, lost * torch.nan, exact, 1e-6).passed
    # What a dtype cannot hold is not asked of it.
    tiny = 1e-9 * exact
    assert accuracy.judge(tiny.half(), lost.half(), tiny, 1e-6).passed


def test_what_stands_in_for_a_gpu_has_all_that_one_has() -> None:
    def methods(kind) -> dict[str, list[str]]:
        public = {name: f for name, f in vars(kind).items() if callable(f) and name[0] != "_"}
        return {name: list(inspect.signature(f).parameters) for name, f in public.items()}

    assert methods(machines.Cuda) == methods(machines.Interpreted)


# Sections that end badly.

BAD_SECTIONS = """
    import json, os, signal, sys, time
    from pathlib import Path
    from first_light.accuracy import Verdict
    from first_light.results import Results
    from first_light.sections import Section, run_sections

    def fine(report):
        report.check("right", Verdict(1e-3, 2e-3, 1e-3))

    def raises(report):
        report.check("before the end", Verdict(1e-3, 2e-3, 1e-3))
        print("some last words")
        raise RuntimeError("no luck")

    def exits(report):
        os._exit(7)

    def is_killed(report):
        report.note("before", "it was killed")
        os.kill(os.getpid(), signal.SIGKILL)

    def crashes(report):
        os.kill(os.getpid(), signal.SIGSEGV)

    def hangs(report):
        report.check("before it hung", Verdict(1e-3, 2e-3, 1e-3))
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass

    def writes_half_a_line(report):
        report._file.write('{"kind": "check", "na')
        report._file.flush()
        os._exit(1)

    def fails(report):
        report.check("wrong", Verdict(float("nan"), 1e-3, 1e-3))

    jobs = int(sys.argv[2])
    results = Results(Path(sys.argv[1]), {})
    bad = [raises, exits, is_killed, crashes, hangs, writes_half_a_line, fails]
    works = [fine] if sys.argv[3] == "fine" else [work for x in bad for work in (x, fine)]
    limits = {hangs: 1.0}
    sections = [Section(f"{w.__name__} {i}", w, limits.get(w, 600.0)) for i, w in enumerate(works)]
    run_sections(sections, jobs, time.monotonic() + 600, {}, results.add, results.end)
    left = [Section("too late", fine, 600.0)] if sys.argv[3] == "late" else []
    run_sections(left, jobs, time.monotonic() - 1, {}, results.add, results.end)
    print(results.tables())
    sys.exit(not results.passed)
"""


def run_bad_sections(
    folder: Path, jobs: int, kind: str
) -> tuple[subprocess.CompletedProcess, dict]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(BAD_SECTIONS))
    search = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(jobs), kind],
        env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done, json.loads((folder / "first-light.json").read_text())


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_section_that_ends_badly_ends_alone(jobs, tmp_path) -> None:
    done, found = run_bad_sections(tmp_path, jobs, "late")
    assert done.returncode == 1
    ended = {section["section"].split(" ")[0]: section for section in found["sections"]}
    status = {name: section["status"] for name, section in ended.items()}
    assert status == {
        "fine": "ok", "fails": "ok", "raises": "exit code 1", "exits": "exit code 7",
        "is_killed": "killed by SIGKILL", "crashes": "killed by SIGSEGV",
        "hangs": "ended after 1 s", "writes_half_a_line": "exit code 1",
        "too": "not started: no time left",
    }  # fmt: skip
    assert "some last words" in ended["raises"]["output"]
    assert ended["raises"]["output"][-1] == "RuntimeError: no luck"
    # Where it hung, by the stack that it wrote when it was told to abort.
    assert any("in hangs" in line for line in ended["hangs"]["output"])
    assert any("in crashes" in line for line in ended["crashes"]["output"])
    names = [check["name"] for check in found["checks"]]
    assert names.count("right") == 7
    assert {"before the end", "before it hung", "wrong"} <= set(names)
    assert found["notes"][0]["text"] == "it was killed"
    assert "FAILED  wrong: not a number, not 1.0e-03" in done.stdout
    assert "| RuntimeError: no luck" in done.stdout


def test_the_exit_code_is_0_where_all_is_well(tmp_path) -> None:
    done, found = run_bad_sections(tmp_path, 2, "fine")
    assert done.returncode == 0 and len(found["checks"]) == 1


def test_the_tables_fit_whatever_was_found(tmp_path) -> None:
    filled = results.Results(tmp_path, {})
    check = {"kind": "check", "passed": False, "error": 1.0, "budget": 1e-3, "plain": 1e-3}
    long = "a name that goes on and on " * 20
    for i in range(60):
        filled.add("section", [check | {"name": f"{i} {long}"}])
        timing = {"kind": "timing", "name": f"{i} {long}", "ms": 1.0, "floor_ms": 0.5, "share": 0.5}
        filled.add("section", [timing, {"kind": "note", "name": "note", "text": long}])
        filled.end(
            importlib.import_module("first_light.sections").Outcome(long, "killed", 1.0, [long])
        )
    text = filled.tables()
    assert len(text) < 11_000 and "CHECKS" in text and "TIMINGS" in text and "more lines" in text
    assert not list(tmp_path.glob("*.part"))


# All of it, interpreted.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, dict]:
    output = tmp_path_factory.mktemp("first-light")
    command = [
        sys.executable, str(BENCHMARKS / "gpu.py"), "--first-light", "--device", "cpu", "--tiny",
        "--seconds", "3000", "--output", str(output),
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
    return done.stdout, json.loads((output / "first-light.json").read_text())


# One worker runs it for all.
TINY = pytest.mark.xdist_group("first light")


@TINY
def test_every_section_runs_to_its_end(tiny) -> None:
    _, found = tiny
    sections = {section["section"]: section["status"] for section in found["sections"]}
    assert set(sections.values()) == {"ok"}
    run = importlib.import_module("first_light.run")
    expected = [
        section.name
        for make in (run.first_sections, run.rate_sections, run.check_sections, run.timing_sections)
        for section in make(MACHINE, 100.0)
    ]
    assert sorted(sections) == sorted(expected) and len(set(expected)) == len(expected)


PUBLIC = [
    "token_logprobs", "token_stats", "logits_policy_loss", "kl_divergence reverse",
    "kl_divergence forward", "kl_divergence jsd", "softmax_fisher_product", "gae", "dpo_loss",
    "dpo_loss packed", "gae packed", "linear_token_logprobs", "linear_token_stats", "linear_loss",
    "linear_cross_entropy", "linear_dpo_loss", "linear_policy_loss",
    "linear_kl_divergence reverse", "linear_kl_divergence jsd",
]  # fmt: skip
KINDS = [
    "again: same bits", "in place: same bits", "a row alone", "unaligned view", "past 2^31: ",
    "times 2", "without waiting", "on a side stream", "in a graph", "on another device",
    "0 where ignored", "gradients of 1e-06", "addmm fp32 += bfloat16", "rows padded by 3",
    "frozen head", "trained head", "where p is nearly 1",
]  # fmt: skip


@TINY
def test_every_check_is_there(tiny) -> None:
    _, found = tiny
    names = [check["name"] for check in found["checks"]]
    assert all(check["passed"] for check in found["checks"])
    for name in PUBLIC:
        assert any(check.startswith(name) for check in names), name
    for kind in KINDS:
        assert any(kind in check for check in names), kind
    for name in PUBLIC[:6]:
        for part in ("targets", "the rest"):
            assert any(x.startswith(name) and x.endswith(f"logits, {part}") for x in names), name


@TINY
def test_every_timing_is_there(tiny) -> None:
    _, found = tiny
    names = [timing["name"] for timing in found["timings"]]
    work = importlib.import_module("first_light.kernel_work")
    for kernel in work.Logits(MACHINE, 2, 64).works():
        assert names.count(kernel) == len(MACHINE.sizes.timed), kernel
    # P0 to P4 are the plans of `fastrlhf/ops/linear_plans.py`, from READ_ONLY to RECOMPUTE.
    for plan in ("P0", "P1", "P2", "P3", "P4", "plain PyTorch", "TRL", "GAE", "DPO tail forward"):
        assert any(name.startswith(plan) for name in names), plan
    for trainer in ("DPOTrainer, full", "DPOTrainer, LoRA", "GRPOTrainer, full"):
        assert {f"{trainer}: {x}" for x in ("TRL", "patched")} <= set(names)
    products = ("logits fp32", "logits bf16", "d_hidden", "d_weight, beta 0", "d_weight, beta 1")
    assert [name.split(": ")[1] for name in names if " rows: " in name] == list(products)
    loops = importlib.import_module("lazy_loops").LOOPS
    of_loops = {f"{loop}: {x}" for loop in loops for x in ("plain", "lazy_logits")}
    assert of_loops <= set(names)
    for timing in found["timings"]:
        assert timing["ms"] > 0 and (timing["name"] in of_loops or timing["floor_ms"] > 0)
    assert found["rates"]["copy_bytes_per_second"] > 0
    assert [step["name"] for step in found["launches"]] == ["DPO step", "PPO step"]
    assert all(step["count"] == len(step["kernels"]) > 0 for step in found["launches"])


@TINY
def test_other_launch_shapes_are_tried(tiny) -> None:
    _, found = tiny
    shapes = importlib.import_module("first_light.launch_shapes")
    names = [timing["name"] for timing in found["timings"]]
    if importlib.util.find_spec("fastrlhf.kernels.launch") is None:
        assert [note["name"] for note in found["notes"]] == ["launch shapes"]
        return
    for kernel in shapes.TRIED.values():
        assert f"{kernel}: default" in names
        assert any(name.startswith(f"{kernel}: best, ") for name in names)
        assert sum(kernel in t["name"] for t in found["timings"] if t.get("variant")) == 2


@TINY
def test_the_last_thing_printed_are_the_tables(tiny) -> None:
    printed, found = tiny
    tables = printed[printed.rindex("CHECKS  ") :]
    assert len(tables) < 11_000 and tables.count("TIMINGS") == 1 and "more lines" not in tables
    checked = {check["section"] for check in found["checks"]}
    assert all(section in tables for section in checked)
    assert {"torch", "triton", "python", "date", "machine"} <= set(found)
    assert found["machine"]["card"] == "interpreted"


def test_who_ends_the_run_gets_the_tables_and_leaves_no_process(tmp_path) -> None:
    script = """
        import os, sys, time
        from pathlib import Path
        from first_light import run
        from first_light.sections import Section

        def hangs(report):
            report.note("process", str(os.getpid()))
            time.sleep(600)

        run.first_sections = lambda machine, seconds: [Section("hangs", hangs, 600.0)]
        sys.exit(run.first_light("cpu", tiny=True, seconds=600, output=Path(sys.argv[1])))
    """
    search = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": search}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = tmp_path / "first-light.json"
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 1 and "process: " in printed and "CHECKS" in printed
    section = int(json.loads(path.read_text())["notes"][0]["text"])
    # Without a parent it is nobody's to wait for, and may stay a while as a zombie.
    status = Path(f"/proc/{section}/stat")
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so_and_leaves_nothing_behind() -> None:
    before = sorted((BENCHMARKS / "results").iterdir())
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--first-light"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no GPU here: nothing measured" in done.stdout
    assert "1 sections" in done.stdout and sorted((BENCHMARKS / "results").iterdir()) == before


def test_signals_are_named() -> None:
    sections = importlib.import_module("first_light.sections")
    assert sections._status(signal.SIGBUS) == "killed by SIGBUS"
