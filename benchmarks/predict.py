"""Predict, without a GPU, how fast each kernel and each plan is on an H100, and what limits it.

    python benchmarks/predict.py    # writes the tables of benchmarks/results/predictions.md

Kernels are compiled for sm_90 as they would be launched. Registers, and instructions for each
element of the logits, are read from the machine code; the bytes that move follow from the
algorithm. The predicted time is the largest of four limits: bytes at the rate of a copy,
instructions at the rate at which they are issued, special functions (exponentials, logarithms,
reciprocals), and the bytes in flight. Predictions are to be compared with the times that `gpu.py
--first-light` measures. Where they are wrong, something is not understood.

K1 is the kernel of the statistics of logits, K2 the kernel of their gradient, and K3 that of the
policy loss. The plans P0 to P4 from hidden states are described in docs/concepts/plans.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
PREDICTIONS = ROOT / "benchmarks" / "results" / "predictions.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from first_light.row_order import policy_loss_in_row_order  # noqa: E402
from support import lint_kernels  # noqa: E402
from support.compile_lint import Launch, captured_launches, compile_launch  # noqa: E402

from fastrlhf.kernels import divergence, fisher, launch, token_stats  # noqa: E402
from fastrlhf.reference import FURTHER_STATS  # noqa: E402

# Rates and sizes of an H100 SXM. Those of a device copy and of a large bf16 matmul were measured by
# others; the rest is from its data sheet.
COPY_BYTES = 3.0e12
MATMUL_FLOPS = 800e12
PROCESSORS, CLOCK, LANES_ISSUED, SPECIAL_LANES = 132, 1.7e9, 128, 16
REGISTERS, THREADS, CACHE_BYTES = 65536, 2048, 50e6
# A cache line may be held in both halves of the cache, so only half of its size is relied on.
USEFUL_CACHE = CACHE_BYTES / 2
# Bytes that a multiprocessor must have requested at any time to keep the memory busy.
BYTES_TO_BE_BUSY = 40e3

ROWS, VOCAB, WIDTH = 8192, 128256, 4096
BF16, FP32 = torch.bfloat16, torch.float32


class Code(NamedTuple):
    """Facts about a launch that are read from its machine code."""

    registers: int
    programs: int  # at a time on a multiprocessor
    bytes_in_flight: float  # on a multiprocessor
    instructions: float  # for each element of the logits
    special: float  # special functions for each element


class Bytes(NamedTuple):
    """Bytes that move for each element of the logits."""

    floor: float
    read_again: float = 0.0  # by a second sweep, from the cache if it fits there


class Kernel(NamedTuple):
    """A launch, and the bytes that it moves."""

    name: str
    shape: str  # its key in `launch.SHAPES`
    moves: Bytes
    start: Callable[[], object]


def machine_code(one: Launch, rows_read: int, shape: launch.TileShape) -> Code:
    """Compile a launch for sm_90 and read its machine code."""
    binary = compile_launch(one, "sm_90")
    warps = one.options["num_warps"]
    elements = one.arguments["LANES"] * one.arguments["VEC"] / (32 * warps)
    by_registers = REGISTERS // (-(-binary.registers // 8) * 8 * 32 * warps)
    programs = min(by_registers, THREADS // (32 * warps))
    in_flight = programs * warps * 32 * shape.thread_bytes * rows_read * max(1, shape.stages - 1)
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", binary.assembly)
    steps = loops(code) or [[text for _, text in code if not text.startswith("NOP")]]
    steps = [step for step in steps if any("LDG" in text for text in step)]
    instructions = sum(map(len, steps)) / elements
    special = sum("MUFU" in text for step in steps for text in step) / elements
    return Code(binary.registers, programs, in_flight, instructions, special)


def loops(code: list[tuple[str, str]]) -> list[list[str]]:
    """Return the instructions of each loop: from a backward jump's target to the jump.

    Short loops are left out.
    """
    place = {int(address, 16): i for i, (address, _) in enumerate(code)}
    found = []
    for i, (_, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        first = place.get(int(jump.group(1), 16), i) if jump else i
        if i - first > 30:
            found.append([line for _, line in code[first : i + 1]])
    return found


def limits(code: Code, moves: Bytes, row_bytes: float, sweeps: bool) -> dict[str, float]:
    """Return the share of a copy's speed that each limit allows."""
    floor = moves.floor / COPY_BYTES
    in_flight = PROCESSORS * code.programs * row_bytes
    missed = max(0.0, 1 - USEFUL_CACHE / in_flight) if sweeps else 0.0
    return {
        "bytes": floor / ((moves.floor + missed * moves.read_again) / COPY_BYTES),
        "instructions": floor / (code.instructions / (PROCESSORS * LANES_ISSUED * CLOCK)),
        "special functions": floor / (code.special / (PROCESSORS * SPECIAL_LANES * CLOCK)),
        "in flight": code.bytes_in_flight / BYTES_TO_BE_BUSY,
    }


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kernels() -> list[Kernel]:
    """List every kernel that reads the whole vocabulary, on bf16 logits."""
    logits, rows = meta(1, 96, VOCAB, dtype=BF16), meta(96, dtype=FP32)
    targets, mask = meta(96, dtype=torch.int64), meta(96, dtype=torch.bool)
    planes = meta(6, 96, dtype=FP32)

    def options(softcap: float | None = None) -> dict:
        return {"temperature": 1.0, "softcap": softcap, "scale": 1.0}

    def statistics(
        entropy: bool = False, softcap: float | None = None, with_stats: tuple[str, ...] = ()
    ) -> object:
        return token_stats.token_stats_forward(
            logits, targets, ignore_index=-100, entropy=entropy, with_stats=with_stats,
            **options(softcap),
        )  # fmt: skip

    def gradient(entropy: bool = False, softcap: float | None = None) -> object:
        saved = (rows, rows if entropy else rows[:0], rows, rows)
        return token_stats.token_stats_backward(
            logits, logits, targets, saved, rows, rows if entropy else None, **options(softcap)
        )

    def distance(share: float | None) -> object:
        return divergence.divergence_forward(logits, logits, mask, share=share, **options())

    def distance_gradient(*, of_p: bool, share: float | None) -> object:
        return divergence.divergence_backward(
            logits[0], logits, logits, mask, planes, rows, of_p=of_p, share=share, **options()
        )

    def policy() -> object:
        return lint_kernels.launch_policy_loss(VOCAB, BF16, "clip", "k3", False)

    def in_row_order() -> object:
        return policy_loss_in_row_order(logits[0], logits[0], targets, rows, rows, rows)

    def product() -> object:
        return fisher.fisher_product(logits, logits, mask, temperature=1.0, dtype=BF16)

    one, two = Bytes(2), Bytes(4)
    pair = Bytes(4, read_again=4)
    return [
        Kernel("K1, statistics", "token_stats", one, statistics),
        Kernel("K1 with entropy", "token_stats", one, lambda: statistics(True)),
        Kernel("K1 with a softcap", "token_stats", one, lambda: statistics(softcap=30.0)),
        Kernel("K1 with all further statistics", "token_stats", one,
               lambda: statistics(with_stats=FURTHER_STATS)),
        Kernel("K2, gradient", "token_stats_backward", two, gradient),
        Kernel("K2 with entropy", "token_stats_backward", two, lambda: gradient(True)),
        Kernel("K2 with a softcap", "token_stats_backward", two, lambda: gradient(softcap=30.0)),
        Kernel("K3, policy loss", "policy_loss", Bytes(4, read_again=2), policy),
        Kernel("K3 in row order, a candidate", "token_stats", Bytes(4), in_row_order),
        Kernel("KL forward", "divergence", pair, lambda: distance(None)),
        Kernel("KL backward, of p", "divergence_backward", Bytes(6),
               lambda: distance_gradient(of_p=True, share=None)),
        Kernel("KL backward, of q", "divergence_backward", Bytes(6),
               lambda: distance_gradient(of_p=False, share=None)),
        Kernel("JSD forward", "divergence", pair, lambda: distance(0.5)),
        Kernel("JSD backward", "divergence_backward", Bytes(6),
               lambda: distance_gradient(of_p=True, share=0.5)),
        Kernel("Fisher product", "fisher", Bytes(6, read_again=4), product),
    ]  # fmt: skip


def kernel_table(chosen: list[Kernel]) -> str:
    """Make a table with a line for each kernel, at its shape in `launch.SHAPES`."""
    lines = [
        "| kernel | shape (warps, bytes, stages) | registers | programs | KB in flight | "
        "instructions | special | bytes | floor ms | limit | predicted ms | share of copy |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel in chosen:
        with captured_launches(pytest.MonkeyPatch()) as launches:
            kernel.start()
        one, shape = launches[0], launch.SHAPES[kernel.shape]
        rows_read = 2 if kernel.shape in ("divergence", "divergence_backward", "fisher") else 1
        code = machine_code(one, rows_read, shape)
        sweeps = kernel.moves.read_again > 0
        shares = limits(code, kernel.moves, 2 * VOCAB * rows_read, sweeps)
        limit = min(shares, key=lambda name: shares[name])
        share = min(1.0, shares[limit])
        floor = 1e3 * kernel.moves.floor * ROWS * VOCAB / COPY_BYTES
        moves = f"{kernel.moves.floor:.0f}"
        if sweeps:
            moves += f" to {kernel.moves.floor + kernel.moves.read_again:.0f}"
        lines.append(
            f"| {kernel.name} | {shape.warps}, {shape.thread_bytes}, {shape.stages} | "
            f"{code.registers} | {code.programs} | {code.bytes_in_flight / 1e3:.0f} | "
            f"{code.instructions:.1f} | {code.special:.1f} | {moves} | {floor:.2f} | {limit} | "
            f"{floor / share:.2f} | {100 * share:.0f}% |"
        )
    return "\n".join(lines)


def plan_table() -> str:
    """Make the table of what each plan costs beyond its matmuls.

    These costs are the bytes of the logits, and the bytes of the sums of the weight's gradient.
    """
    matmul = 2 * ROWS * VOCAB * WIDTH / MATMUL_FLOPS
    element, weight = ROWS * VOCAB, VOCAB * WIDTH

    def sums(passes: int) -> int:
        return (8 * passes - 4) * weight + 6 * weight  # with the conversion of the sum to bf16

    plans = [
        ("P0", 1, 8, 4, 0),
        ("P1", 2, 16, 10, 0),
        ("P2, P3; the weight's sum in 8 passes", 3, 18, 12, sums(8)),
        ("P2, P3; in 4 passes, as it is", 3, 18, 12, sums(4)),
        ("P2, P3; in one pass", 3, 18, 12, sums(1)),
        ("P4", 4, 22, 14, sums(4)),
    ]
    lines = [
        "| plan | matmuls ms | bytes an element | predicted ms | with bf16 logits | "
        "if bytes hide behind matmuls |",
        "|---|---|---|---|---|---|",
    ]
    for name, matmuls, fp32, bf16, more in plans:
        busy = matmuls * matmul
        wide, narrow = ((bytes_ * element + more) / COPY_BYTES for bytes_ in (fp32, bf16))
        lines.append(
            f"| {name} | {1e3 * busy:.1f} | {fp32} | {1e3 * (busy + wide):.1f} | "
            f"{1e3 * (busy + narrow):.1f} | {1e3 * max(busy, wide):.1f} |"
        )
    return "\n".join(lines)


def grid_tables(chosen: list[Kernel]) -> str:
    """Make the table of `kernel_table` for the shapes that first light tries."""
    tables = []
    wanted = [x for x in chosen if x.name in ("K1, statistics", "K3, policy loss", "KL forward")]
    default = dict(launch.SHAPES)
    for warps, stages in ((8, 1), (8, 3), (8, 4), (16, 1), (16, 3), (16, 4)):
        launch.SHAPES.update({x.shape: launch.TileShape(warps, 32, stages) for x in wanted})
        table = kernel_table(wanted).split("\n")
        tables += table if not tables else table[2:]
    launch.SHAPES.update(default)
    return "\n".join(tables)


def main(path: Path) -> None:
    """Replace the tables in a file between their marks."""
    chosen = kernels()
    text = path.read_text()
    tables = {
        "kernels": kernel_table(chosen), "grid": grid_tables(chosen), "plans": plan_table(),
        "versions": f"Triton {triton.__version__}, for sm_90",
    }  # fmt: skip
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PREDICTIONS)
