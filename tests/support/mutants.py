"""Change the library in one small way at a time, and see whether the tests notice.

A change that no test notices, a surviving mutant, shows what the tests do not check. The changes
are in `mutant_tables/`. Each is made in a temporary copy of the files that git tracks, never in
the working tree, and the tests that should notice it run there.

    python tests/support/mutants.py                    # all
    python tests/support/mutants.py gae "clip, fp64"   # those with one of these words in their name
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutant import Mutant
from mutant_table import MUTANTS

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


class Result(NamedTuple):
    """What became of one run of tests: the name of what ran, how it ended, and how long it took."""

    name: str
    outcome: str
    seconds: float
    output: str


def copy_tree(destination: Path) -> None:
    """Copy what git tracks, as it is in the working tree; and a link to the package, for imports
    must not find it beside kernels/, whose name is that of another package.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            place = destination / "tree" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place, follow_symlinks=False)
    (destination / "imports").mkdir()
    (destination / "imports/fastrlhf").symlink_to(destination / "tree/fastrlhf")


def run_python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy, where it imports the copy's package."""
    changes = {
        "PYTHONPATH": str(copy / "imports"),
        # A file that changes twice within a second would be taken for its stale bytecode.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy / "tree", env=os.environ | changes,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip


def check_imports(copy: Path) -> None:
    """Raise unless a copy imports itself, and not an installed package."""
    found = run_python(copy, "-c", "import fastrlhf; print(fastrlhf.__file__)").stdout.strip()
    if not found.startswith(str(copy)):
        raise RuntimeError(f"expected to import fastrlhf from {copy}, got {found}")


def run_tests(copy: Path, name: str, tests: str, select: str) -> Result:
    """Run tests until one fails."""
    keywords = ["-k", select] if select else []
    start = time.perf_counter()
    try:
        done = run_python(
            copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *keywords,
            *sorted(str(path) for path in (copy / "tree/tests").glob(tests)),
        )  # fmt: skip
        # Any other code says that the tests did not run: a wrong selection, a broken import.
        outcome, output = {0: "survived", 1: "killed"}.get(done.returncode, "error"), done.stdout
    except subprocess.TimeoutExpired:
        outcome, output = "killed", "the tests did not end"
    return Result(name, outcome, time.perf_counter() - start, output)


def run_mutant(copy: Path, mutant: Mutant) -> Result:
    """Run the tests of a mutant on it, and take the change back."""
    place = copy / "tree" / mutant.file
    original = place.read_text()
    place.write_text(original.replace(mutant.old, mutant.new))
    try:
        return run_tests(copy, mutant.name, mutant.tests, mutant.select)
    finally:
        place.write_text(original)


def check_table(mutants: Iterable[Mutant]) -> None:
    """Raise unless names are unique and each text to replace stands in its file exactly once."""
    names = [mutant.name for mutant in mutants]
    problems = [f"{name}: two mutants of this name" for name in names if names.count(name) > 1]
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1:
            problems.append(f"{mutant.name}: its text is {count} times in {mutant.file}, not once")
    if problems:
        raise SystemExit("\n".join(problems))


def unchanged(mutants: Iterable[Mutant]) -> list[Callable[[Path], Result]]:
    """Make a run of each test file without a change, of all that is selected for its mutants."""
    wanted: dict[str, set[str]] = {}
    for mutant in mutants:
        wanted.setdefault(mutant.tests, set()).add(mutant.select)

    def run(tests: str) -> Callable[[Path], Result]:
        selected = wanted[tests]
        either = "" if "" in selected else " or ".join(f"({x})" for x in sorted(selected))
        return lambda copy: run_tests(copy, f"unchanged: {tests}", tests, either)

    return [run(tests) for tests in sorted(wanted)]


def mutated(mutants: Iterable[Mutant]) -> list[Callable[[Path], Result]]:
    """Make a run of each mutant."""
    return [lambda copy, mutant=mutant: run_mutant(copy, mutant) for mutant in mutants]


def run_all(copies: list[Path], runs: list[Callable[[Path], Result]]) -> list[Result]:
    """Run everything, each copy one at a time, and print a line for each."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def with_a_copy(run: Callable[[Path], Result]) -> Result:
        copy = free.get()
        try:
            result = run(copy)
        finally:
            free.put(copy)
        print(f"{result.outcome:<10}{result.seconds:6.1f} s  {result.name}", flush=True)
        return result

    with ThreadPoolExecutor(len(copies)) as pool:
        return list(pool.map(with_a_copy, runs))


def verdict(mutants: list[Mutant], results: list[Result]) -> int:
    """Print the share that was killed, and what is wrong; return the exit status."""
    wrong = 0
    for mutant, result in zip(mutants, results, strict=True):
        if result.outcome == ("survived" if mutant.equivalent else "killed"):
            continue
        wrong += 1
        print(f"\n{result.outcome}: {mutant.name} ({mutant.file})\n  {mutant.old!r}")
        print(f"  -> {mutant.new!r}" + (" is listed as equivalent" if mutant.equivalent else ""))
        if result.outcome == "error":
            print(result.output[-2000:])
    equivalent = [mutant for mutant in mutants if mutant.equivalent]
    killed = sum(
        result.outcome == "killed" and not mutant.equivalent
        for mutant, result in zip(mutants, results, strict=True)
    )
    counted = len(mutants) - len(equivalent)
    share = f" ({killed / counted:.0%})" if counted else ""
    print(f"\n{killed} of {counted} mutants killed{share}, {len(equivalent)} equivalent:")
    for mutant in equivalent:
        print(f"  {mutant.name}: {mutant.equivalent}")
    return 1 if wrong else 0


def main() -> int:
    """Run the mutants whose names are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="run mutants with one of these in their name")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="check the table, list it, and stop")
    options = parser.parse_args()
    check_table(MUTANTS)
    words = options.words or [""]
    mutants = [m for m in MUTANTS if any(word in m.name for word in words)]
    if not mutants:
        raise SystemExit(f"no mutant has one of {words} in its name")
    if options.list:
        print("\n".join(f"{mutant.name}  ({mutant.file})" for mutant in mutants))
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Path(folder).resolve() / str(i) for i in range(options.workers)]
        for copy in copies:
            copy_tree(copy)
            check_imports(copy)
        for result in run_all(copies, unchanged(mutants)):
            if result.outcome != "survived":  # what fails anyway would kill every mutant
                raise SystemExit(f"{result.name}: {result.outcome}\n{result.output[-4000:]}")
        results = run_all(copies, mutated(mutants))
    status = verdict(mutants, results)
    print(f"{time.perf_counter() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
