"""The test suite on a GPU's real kernels, for as long as there is time."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Beginnings of the names of test files. The first are tests of files, of the compiler or of recipes
# on the CPU, for which a GPU makes no difference. The second are the most telling tests.
_WITHOUT_GPU = ("compile_lint", "packaging", "imports", "readme", "demo", "trpo_learns",
                "benchmark", "first_light", "trl_parity")  # fmt: skip
_TESTS_FIRST = ("real_sizes", "token_stats", "logits_policy_loss", "divergence", "fisher")
# There are few workers, because each holds GPU memory: that of kernels, and up to 30 GiB in the
# tests past 2^31 elements.
_WORKERS = 2


def run_tests(output: Path, seconds: float) -> str:
    """Run the suite for at most `seconds`, write its output to a file, and return how it ended."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *test_files()]
    if importlib.util.find_spec("xdist"):
        # Workers get one test at a time, so that tests run in the order of the files.
        command += ["-p", "xdist.plugin", "-n", str(_WORKERS), "--maxschedchunk", "1"]
    # Installed plugins are not loaded: they could warn, and warnings are errors here.
    quiet = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    with (output / "tests.txt").open("w") as log:
        tests = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | quiet,
            start_new_session=True,
        )  # fmt: skip
        try:
            outcome = "passed" if tests.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            _stop(tests)
            outcome = f"cut off after {seconds:.0f} s"
    lines = (output / "tests.txt").read_text().split("\n")
    summary = next((line for line in reversed(lines) if line.strip()), "")
    return f"{outcome} ({summary.strip('= ')})"


def test_files() -> list[str]:
    """Return the test files for which a GPU matters, the most telling first."""
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    named = sorted(name for name in names if not name.startswith(_WITHOUT_GPU))
    first = [name for start in _TESTS_FIRST for name in named if name.startswith(start)]
    rest = [name for name in named if name not in first]
    return [str(ROOT / "tests" / f"test_{name}.py") for name in (*first, *rest)]


def _stop(tests: subprocess.Popen) -> None:
    """Let pytest report what failed so far, then end it and all of its workers."""
    tests.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        tests.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(tests.pid, signal.SIGKILL)
    tests.wait()
