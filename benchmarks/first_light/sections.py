"""Run each section as a process of its own, so that one that crashes or hangs ends alone.

Sections are forked from a process that has imported everything and has not touched the GPU, so that
they start at once. A section writes its findings line by line to one file, and its output to
another file. So both are available whatever happens to the section.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import IO, Any, NamedTuple, TypeVar

from .accuracy import Verdict

Record = dict[str, Any]
Found = TypeVar("Found")

_LAST_LINES = 12
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 2.0  # time in which a section that hangs may write its stack


class Reporter:
    """Writes the findings of a section."""

    def __init__(self, file: IO[str], rates: Record) -> None:
        """Write to a file. `rates` are those of this card, if their section measured them."""
        self._file, self.rates = file, rates

    def record(self, kind: str, **what: Any) -> None:
        """Write a complete record at once, so that later failures cannot lose it."""
        self._file.write(json.dumps({"kind": kind} | what, allow_nan=False) + "\n")
        self._file.flush()

    def check(self, name: str, verdict: Verdict) -> None:
        """Report a comparison. NaN becomes null, since JSON has no NaN."""
        figures = {key: x if math.isfinite(x) else None for key, x in verdict._asdict().items()}
        self.record("check", name=name, passed=verdict.passed, **figures)

    def holds(self, name: str, condition: bool) -> None:
        """Report whether a condition holds."""
        self.check(name, Verdict(0.0 if condition else 1.0, 0.0, 0.0))

    def timing(self, name: str, seconds: float, floor: float | None = None, **more: Any) -> None:
        """Report a time, and the `floor`: the least time for this work at the card's own rates."""
        floor_ms = None if floor is None else 1e3 * floor
        share = None if floor is None else floor / seconds
        self.record("timing", name=name, ms=1e3 * seconds, floor_ms=floor_ms, share=share, **more)

    def note(self, name: str, text: str) -> None:
        """Report in words why a figure is missing."""
        self.record("note", name=name, text=text[:300])

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do some work. If it fails, a note is reported and the section goes on."""
        try:
            work()
        except Exception as error:  # any exception is reported as a note
            self.note(name, _describe(error))

    def demand(self, name: str, work: Callable[[], Found]) -> Found | None:
        """Return the result of some work. If it fails, a failed check is reported and the section
        goes on.
        """
        try:
            return work()
        except Exception as error:  # any exception of an operation is a failed check
            self.holds(f"{name}: {_describe(error)}", False)
            return None


def _describe(error: Exception) -> str:
    """Describe an error in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


class Section(NamedTuple):
    """A part of the run: its name, work and time limit in seconds."""

    name: str
    work: Callable[[Reporter], None]
    seconds: float


class Outcome(NamedTuple):
    """How a section ended, and the last lines of its output if it did not end well."""

    section: str
    status: str  # "ok", or what happened
    seconds: float
    output: list[str]


class Process:
    """The process of a section."""

    def __init__(self, section: Section, seconds: float, rates: Record) -> None:
        """Fork the process, which starts its work."""
        self.section, self._limit = section, min(section.seconds, seconds)
        self._start, self._aborted = time.monotonic(), False
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._records = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self._read = 0
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._run(rates)

    def _run(self, rates: Record) -> None:
        """Do the section's work in the new process, and exit; this never returns."""
        code = 1
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(self._log.fileno(), stream)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.enable(file=2)  # writes the stack at SIGABRT
            with open(self._records.name, "a") as records:
                self.section.work(Reporter(records, rates))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def new_records(self) -> list[Record]:
        """Return the records that were completely written since the last call."""
        with open(self._records.name) as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        return [json.loads(line) for line in whole.splitlines()]

    def outcome(self) -> Outcome | None:
        """Return how the section ended; None while it runs within its time."""
        seconds = time.monotonic() - self._start
        pid, code = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0 and seconds <= self._limit:
            return None
        if pid == 0 and not self._aborted:
            self._aborted = True
            os.kill(self._pid, signal.SIGABRT)
            return None
        if pid == 0 and seconds <= self._limit + _GRACE_SECONDS:
            return None
        self.kill()
        status = _status(code) if not self._aborted else f"ended after {self._limit:.0f} s"
        return Outcome(self.section.name, status, seconds, [] if status == "ok" else self._tail())

    def kill(self) -> None:
        """Kill the process and those that it started, which may still run after its end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def _tail(self) -> list[str]:
        self._log.seek(0)
        return [line.rstrip()[:300] for line in self._log.read().splitlines()[-_LAST_LINES:]]


def _status(code: int) -> str:
    if os.WIFSIGNALED(code):
        return f"killed by {signal.Signals(os.WTERMSIG(code)).name}"
    return "ok" if code == 0 else f"exit code {os.waitstatus_to_exitcode(code)}"


def run_sections(
    sections: list[Section],
    jobs: int,
    deadline: float,
    rates: Record,
    found: Callable[[str, list[Record]], None],
    ended: Callable[[Outcome], None],
) -> None:
    """Run sections in their order, `jobs` at a time, until `deadline` on `time.monotonic`.

    `found` is called with new records of a section, and `ended` with the outcome of a section.
    """
    waiting, running = list(sections), []
    try:
        while waiting or running:
            left = deadline - time.monotonic()
            while waiting and left <= 0:
                ended(Outcome(waiting.pop(0).name, "not started: no time left", 0.0, []))
            while waiting and len(running) < jobs:
                running.append(Process(waiting.pop(0), left, rates))
            time.sleep(_POLL_SECONDS)
            for process in list(running):
                outcome = process.outcome()
                if records := process.new_records():
                    found(process.section.name, records)
                if outcome is not None:
                    running.remove(process)
                    ended(outcome)
    finally:
        for process in running:
            process.kill()
