"""Time the plans from hidden states, and the peers.

Times are compared with G, the time of one matmul over the vocabulary: 2·N·V·H operations at the
rate of this card's bf16 matmul. The plans P0 to P4 are described in docs/concepts/plans.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from batch import Batch, Shape, make_batch
from providers import PEER_LINEAR_LOGPROBS, eager_logprobs
from torch import Tensor, autograd
from torch.utils.checkpoint import checkpoint

import fastrlhf
from fastrlhf.ops import head_gradients
from fastrlhf.ops.linear_plans import Workbench

from .machine import Machine
from .sections import Reporter

_SEQUENCES = 8
_PEERS = ("TRL chunked log-probs", "Liger scaled cross-entropy", "F.linear_cross_entropy")


class Bench:
    """A batch of hidden states without a prompt, and a head."""

    def __init__(self, report: Reporter, machine: Machine, rows: int | None = None) -> None:
        """Draw the batch, with `rows` tokens or as many as are timed."""
        sizes = machine.sizes
        self.report, self.machine = report, machine
        self.rows = rows or sizes.plan_rows
        self.vocab, self.width = sizes.timed[0][1], sizes.plan_width
        shape = Shape(
            _SEQUENCES, self.rows // _SEQUENCES, self.vocab, self.width, prompt=0.0, trained=True,
            dtype=torch.bfloat16,
        )  # fmt: skip
        self.batch: Batch = make_batch("hidden", shape, machine.device)

    def floor(self, matmuls: float, rows: int | None = None) -> float | None:
        """Return the seconds of so many matmuls of all rows, or of `rows` rows."""
        rate = self.report.rates.get("matmul_flops_per_second")
        flops = 2 * (rows or self.rows) * self.vocab * self.width * matmuls
        return flops / rate if rate else None

    def time(self, name: str, work: Callable[[], Any], matmuls: float) -> None:
        """Report a plan's time, and its memory beyond its gradients, or one line if it fails."""

        def run() -> None:
            work()  # not timed: compiles, and reserves memory
            gradients, peak = self.machine.peak_bytes(work)
            kept = sum(x.nbytes for x in gradients)
            del gradients
            seconds = self.machine.seconds(work, rounds=5)
            beyond = max(0, peak - kept) / 2**30
            self.report.timing(name, seconds, self.floor(matmuls), peak_gib=round(beyond, 2))

        self.report.attempt(name, run)

    def gradients(self, value: Tensor, *, trained: bool = True) -> tuple[Tensor, ...]:
        """Return the gradients of the hidden states, and of the head if it is trained."""
        upstream = self.batch.upstream if value.ndim else None
        leaves = [self.batch.hidden, self.batch.weight][: 1 + trained]
        return autograd.grad(value, leaves, upstream)


def _logprobs(batch: Batch, *, trained: bool, **options: Any) -> Tensor:
    weight = batch.weight if trained else batch.weight.detach()
    return fastrlhf.linear_token_logprobs(batch.hidden, weight, batch.targets, **options)


def _loss(batch: Batch, **options: Any) -> Tensor:
    def nll(stats: fastrlhf.ChunkStats) -> Tensor:
        return -stats.logprob.mean()

    return fastrlhf.linear_loss(nll, batch.hidden, batch.weight, batch.targets, **options)[0]


def _dpo(batch: Batch, **options: Any) -> Tensor:
    ref = torch.zeros(_SEQUENCES, device=batch.targets.device)
    pairs = torch.arange(_SEQUENCES, device=batch.targets.device).chunk(2)
    head = (batch.hidden, batch.weight, batch.targets)
    return fastrlhf.linear_dpo_loss(*head, ref, *pairs, **options)[0].mean()


def _plans(bench: Bench) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return the work of the plans P0 to P4 with their numbers of matmuls."""
    batch, options = bench.batch, {"impl": "triton"}

    def no_gradients() -> list[Tensor]:
        with torch.no_grad():
            _logprobs(batch, trained=True, **options)
        return []

    def frozen() -> tuple[Tensor, ...]:
        return bench.gradients(_logprobs(batch, trained=False, **options), trained=False)

    def trained() -> tuple[Tensor, ...]:
        return bench.gradients(_logprobs(batch, trained=True, **options))

    return {
        "P0 no gradient, 1G": (no_gradients, 1),
        "P1 frozen head, 2G": (frozen, 2),
        "P2 linear_loss, 3G": (lambda: bench.gradients(_loss(batch, **options)), 3),
        "P3 linear_dpo_loss, 3G": (lambda: bench.gradients(_dpo(batch, **options)), 3),
        "P4 log-probs, 4G": (trained, 4),
    }


def _support(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return kept ids: the target alone for half the tokens, 15 for the others, 8 on average."""
    targets, vocab = batch.targets.flatten(), batch.weight.shape[0]
    step = torch.arange(15, device=targets.device) * (vocab // 15)
    ids = (targets.unsqueeze(1) + step) % vocab
    lengths = torch.where(torch.arange(len(targets), device=targets.device) % 2 == 0, 1, 15)
    kept = torch.arange(15, device=targets.device) < lengths.unsqueeze(1)
    return ids[kept], torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def time_fewer_rows(report: Reporter, machine: Machine) -> None:
    """Time cases that do not need the logits of every token for every word.

    In these, tokens keep some ids, a third of the tokens has a gradient, or each hidden state has
    two targets.
    """
    bench = Bench(report, machine)
    batch, width = bench.batch, bench.width
    support, options = _support(batch), {"impl": "triton"}
    rate = report.rates.get("copy_bytes_per_second")
    counts = support[1].diff()
    pass_bytes = int(counts[counts > 1].sum()) * width * batch.weight.element_size()

    def kept() -> Tensor:
        return _logprobs(batch, trained=True, support=support, **options)

    def time(name: str, work: Callable[[], Any], passes: int, more_bytes: int = 0) -> None:
        floor = (passes * pass_bytes + more_bytes) / rate if rate else None
        report.attempt(name, lambda: report.timing(name, machine.seconds(work), floor))

    with torch.no_grad():
        time("kept ids, forward", kept, 1)
    gradients = batch.weight.nbytes + batch.hidden.nbytes
    time("kept ids, trained head", lambda: bench.gradients(kept()), 3, gradients)
    third = (torch.arange(batch.targets.numel(), device=machine.device) % 3 == 0).float()

    def sparse() -> Tensor:
        def loss(stats: fastrlhf.ChunkStats, weight: Tensor) -> Tensor:
            return -(stats.logprob * weight).mean()

        head = (batch.hidden, batch.weight, batch.targets, third.view(batch.targets.shape))
        return fastrlhf.linear_loss(loss, *head, **options)[0]

    bench.time("P2, a third has a gradient, 1.67G", lambda: bench.gradients(sparse()), 1 + 2 / 3)

    def unasked() -> tuple[Tensor, ...]:
        """Run without a wait for the number of tokens in a chunk that have a gradient."""
        with mock.patch.object(Workbench, "few_enough", lambda *_: None):
            return bench.gradients(_loss(batch, **options))

    bench.time("P2, all rows unasked, 3G", unasked, 3)
    rows = torch.arange(batch.targets.numel(), device=machine.device) // 2 * 2

    def shared() -> Tensor:
        def loss(stats: fastrlhf.ChunkStats) -> Tensor:
            return -stats.logprob.mean()

        head = (batch.hidden.flatten(0, 1), batch.weight, batch.targets)
        return fastrlhf.linear_loss(loss, *head, rows=rows.view(batch.targets.shape), **options)[0]

    bench.time("P2, two targets a state, 1.5G", lambda: bench.gradients(shared()), 1.5)


def compile_plans(report: Reporter, machine: Machine) -> None:
    """Run each plan on a few rows, so that its kernels are in Triton's cache when it is timed."""
    bench = Bench(report, machine, min(machine.sizes.plan_rows, 16 * _SEQUENCES))
    for name, (work, _) in _plans(bench).items():
        report.attempt(name, work)


def time_plans(report: Reporter, machine: Machine) -> None:
    """Time P0 to P4, and P2 and P3 with several sizes of workspaces."""
    bench = Bench(report, machine)
    batch = bench.batch
    for name, (work, matmuls) in _plans(bench).items():
        bench.time(name, work, matmuls)
    for workspace in machine.sizes.workspaces:
        # Chunks consist of whole tiles of a matmul. Most tiles of cuBLAS have 128 rows, the largest
        # 256.
        rows = workspace // (4 * bench.vocab)
        chunk = rows // 128 * 128 or rows
        for name, loss in (("P2", _loss), ("P3", _dpo)):

            def work(loss: Any = loss, chunk: int = chunk) -> tuple[Tensor, ...]:
                return bench.gradients(loss(batch, chunk_size=chunk, impl="triton"))

            bench.time(f"{name} in chunks of {chunk}", work, 3)
    for waiting in machine.sizes.waiting:

        def waits(waiting: int = waiting) -> tuple[Tensor, ...]:
            with mock.patch.object(head_gradients, "_WAITING_BYTES", waiting):
                return bench.gradients(_loss(batch, impl="triton"))

        bench.time(f"P2, {waiting / 2**20:g} MiB wait for the weight", waits, 3)


def time_chunk_matmuls(report: Reporter, machine: Machine) -> None:
    """Time the matmuls of a single chunk, to see which of them is far from the card's limit."""
    bench = Bench(report, machine)
    rows, device = machine.sizes.chunk, machine.device
    hidden = bench.batch.hidden.detach().flatten(0, 1)[:rows]
    weight = bench.batch.weight.detach()
    d_logits = torch.randn(rows, bench.vocab, device=device).bfloat16()
    narrow = torch.empty_like(d_logits)
    logits, d_hidden, d_weight = (
        torch.zeros(shape, device=device)
        for shape in ((rows, bench.vocab), (rows, bench.width), weight.shape)
    )
    products = {
        "logits fp32": lambda: machine.add_product(logits, hidden, weight.T, beta=0),
        "logits bf16": lambda: torch.mm(hidden, weight.T, out=narrow),
        "d_hidden": lambda: machine.add_product(d_hidden, d_logits, weight, beta=0),
        "d_weight, beta 0": lambda: machine.add_product(d_weight, d_logits.T, hidden, beta=0),
        "d_weight, beta 1": lambda: machine.add_product(d_weight, d_logits.T, hidden, beta=1),
    }
    for name, product in products.items():

        def time(name: str = name, product: Any = product) -> None:
            seconds = machine.seconds(product)
            report.timing(f"{rows} rows: {name}", seconds, bench.floor(1, rows))

        report.attempt(name, time)


def time_odd_matmuls(report: Reporter, machine: Machine) -> None:
    """Time a chunk's matmuls at an odd vocabulary: rows unaligned, or aligned to 16 bytes."""
    sizes, device = machine.sizes, machine.device
    rows, vocab, width = sizes.chunk, sizes.vocabs[1], sizes.plan_width
    hidden = torch.randn(rows, width, device=device).bfloat16()
    weight = torch.randn(vocab, width, device=device).bfloat16()
    d_hidden = torch.zeros(rows, width, device=device)
    rate = report.rates.get("matmul_flops_per_second")
    floor = 2 * rows * vocab * width / rate if rate else None
    for name, columns in (("anywhere", vocab), ("at 16 bytes", -(-vocab // 64) * 64)):
        logits = torch.zeros(rows, columns, device=device)[:, :vocab]
        d_logits = torch.zeros(rows, columns, device=device).bfloat16()[:, :vocab]
        products = {
            "logits": lambda out=logits: machine.add_product(out, hidden, weight.T, beta=0),
            "d_hidden": lambda a=d_logits: machine.add_product(d_hidden, a, weight, beta=0),
        }
        for product, work in products.items():

            def time(title: str = f"{product}, rows {name}", work: Any = work) -> None:
                report.timing(f"V={vocab}: {title}", machine.seconds(work), floor)

            report.attempt(f"V={vocab}: {product}, rows {name}", time)


def time_others(report: Reporter, machine: Machine) -> None:
    """Time the same gradients with plain PyTorch and with the peers that are installed."""
    bench = Bench(report, machine)
    batch = bench.batch

    def in_chunks() -> Tensor:
        parts = zip(batch.hidden.flatten(0, 1).split(machine.sizes.chunk),
                    batch.targets.flatten().split(machine.sizes.chunk), strict=True)  # fmt: skip
        found = [
            checkpoint(_plain_logprobs, h, batch.weight, y, use_reentrant=False) for h, y in parts
        ]
        return torch.cat(found).view_as(batch.targets)

    bench.time("plain PyTorch, 3G", lambda: bench.gradients(eager_logprobs(batch)), 3)
    bench.time("plain PyTorch in chunks, 4G", lambda: bench.gradients(in_chunks()), 4)
    for name in _PEERS:

        def peer(name: str = name) -> None:
            logprobs = PEER_LINEAR_LOGPROBS[name].load()
            bench.time(f"{name}, by 4G", lambda: bench.gradients(logprobs(batch)), 4)

        report.attempt(name, peer)


def _plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0]
