"""Run the sections of first light in their order, within its limit of seconds.

First the rates of the card are measured, to which all timings are compared. Then the checks run in
parallel, together with the compilation of the kernels that will be timed. Then the timings run one
at a time, the most telling first.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # else each section imports it at its first operator

from . import (
    candidate,
    device_checks,
    from_hidden,
    from_logits,
    kernel_times,
    launch_counts,
    launch_shapes,
    lazy_logits,
    others,
    plan_times,
    trainers,
)
from .machine import Machine, make_machine
from .results import Results
from .sections import Reporter, Section, run_sections

_CHECKS_SHARE = 0.55  # share of the seconds after which the timings begin
_REPORT_SECONDS = 3.0


def first_sections(machine: Machine, seconds: float) -> list[Section]:
    """Return the section that finds out which GPU there is. Without one there is nothing to do."""

    def describe(report: Reporter) -> None:
        report.record("machine", **machine.describe())

    return [Section("machine", describe, 0.1 * seconds)]


def rate_sections(machine: Machine, seconds: float) -> list[Section]:
    """Return the section that measures the card's rates, while nothing else runs."""
    return [Section("rates", partial(kernel_times.measure_rates, machine=machine), 0.1 * seconds)]


def check_sections(machine: Machine, seconds: float) -> list[Section]:
    """Return the checks. They run in parallel, so those that take longest come first."""
    sizes = machine.sizes

    def section(name: str, check: Callable, *arguments: object) -> Section:
        def work(report: Reporter) -> None:
            torch.manual_seed(0)
            check(report, machine, *arguments)

        return Section(name, work, seconds)

    def all_of(*checks: Callable) -> Callable:
        def work(report: Reporter, machine: Machine) -> None:
            for check in checks:
                check(report, machine)

        return work

    linear = dict.fromkeys(itertools.chain(*sizes.linear_dtypes))
    small = all_of(
        others.check_fisher, others.check_advantages, others.check_pairs, others.check_packed
    )
    families = {
        "policy losses": from_logits.POLICIES,
        "divergences": from_logits.DIVERGENCES,
        "statistics": from_logits.STATISTICS,
    }
    return [
        *(
            section(f"linear, {dtype}".replace("torch.", ""), from_hidden.check, dtype)
            for dtype in linear
        ),
        *(
            section(f"{name}, V={vocab}", from_logits.check, operations, i)
            for name, operations in families.items()
            for i, vocab in enumerate(sizes.vocabs)
        ),
        section("rows and hostile values",
                all_of(from_logits.check_rows, from_logits.check_hostile_values)),
        section("Fisher, advantages, pairs", small),
        section("linear, small fp16 gradients", from_hidden.check_small_gradients),
        section("matmuls fp32 += 16 bits", from_hidden.check_products),
        section("offsets past 2^31", device_checks.check_past_int32),
        section("streams, graphs, waiting", device_checks.check_execution),
        section("another device", device_checks.check_another_device),
        section("compile plans", plan_times.compile_plans),
        *(
            section(f"compile kernels, V={vocab}", kernel_times.compile_kernels, vocab)
            for _, vocab in sizes.timed
        ),
        *(
            section(f"compile shapes of {kernel}", launch_shapes.compile_variants, kernel)
            for kernel in launch_shapes.TRIED
        ),
    ]  # fmt: skip


def timing_sections(machine: Machine, seconds: float) -> list[Section]:
    """Return the timings, the most telling first, because a run may be cut off."""

    def section(name: str, share: float, work: Callable, *arguments: object) -> Section:
        return Section(name, lambda report: work(report, machine, *arguments), share * seconds)

    central, *sizes = machine.sizes.timed
    kernels = kernel_times.time_kernels
    return [
        section("kernels {} × {}".format(*central), 0.2, kernels, *central),
        section("plans", 0.2, plan_times.time_plans),
        section("fewer rows", 0.05, plan_times.time_fewer_rows),
        section("matmuls of a chunk", 0.1, plan_times.time_chunk_matmuls),
        section("matmuls at an odd vocabulary", 0.1, plan_times.time_odd_matmuls),
        section("small kernels", 0.1, kernel_times.time_small_kernels),
        section("a candidate", 0.1, candidate.time_row_order),
        section("launches", 0.1, launch_counts.count_launches),
        section("plain PyTorch and peers", 0.2, plan_times.time_others),
        section("trainers", 0.4, trainers.time_trainers),
        *(section("kernels {} × {}".format(*size), 0.15, kernels, *size) for size in sizes),
        section("launch shapes", 0.4, launch_shapes.time_variants),
        section("lazy logits", 0.2, lazy_logits.time_lazy_logits),
    ]


def first_light(device: str, *, tiny: bool, seconds: float, output: Path | None) -> int:
    """Run all sections, and return the exit code."""
    start = time.monotonic()
    machine = make_machine(device, tiny=tiny)
    results = Results(output, {"device": device, "tiny": tiny, "seconds": seconds})
    deadline = start + seconds - _REPORT_SECONDS
    phases = [
        (first_sections(machine, seconds), 1, deadline),
        (rate_sections(machine, seconds), 1, deadline),
        (check_sections(machine, seconds), machine.jobs, start + _CHECKS_SHARE * seconds),
        (timing_sections(machine, seconds), 1, deadline),
    ]
    # If the run is terminated early, it still prints the tables of its findings.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for sections, jobs, until in phases:
            rates = results.found["rates"]
            run_sections(sections, jobs, until, rates, results.add, results.end)
            if not results.found["machine"]:
                print("no GPU here: nothing measured")
                break
    finally:
        print(f"\n{results.path if results.path.exists() else ''}\n{results.tables()}", flush=True)
    return 0 if results.passed else 1
