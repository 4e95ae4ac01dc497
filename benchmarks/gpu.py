"""Everything that needs a GPU, in one command: the tests on real kernels, then times against the
limits.

    python benchmarks/gpu.py [--output DIR] [--skip-tests]

It needs torch, triton and pytest, and no installation of this package. The limit of an operation is
the time that this very device takes to copy as many bytes as the operation must move.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parent.parent
ROWS = [16, 8192]
VOCABS = [32000, 50257, 128256, 151936, 262144]
# Larger than any cache of a GPU: written between timed runs, so that each finds its inputs in
# memory.
FLUSH_BYTES = 2**28


def importable(folder: str) -> None:
    """Make the package importable without the root of the repository, and for the tests too."""
    Path(folder, "fastrlhf").symlink_to(ROOT / "fastrlhf")
    sys.path[0] = folder
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def run_tests(output: Path) -> int:
    """Run the test suite; its output goes to a file too."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")]
    with open(output / "tests.txt", "w") as log:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        log.write(done.stdout)
    print(done.stdout[-4000:], flush=True)
    return done.returncode


def median_ms(work: Callable[[], object], rounds: int = 15) -> float:
    """Median time of `work` on the device, its inputs out of the cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[rounds // 2]


def copy_bandwidth() -> float:
    """Bytes per second that a device copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)


def operations(rows: int, vocab: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Work to time and the bytes that it must move, by name."""
    import fastrlhf

    logits = torch.randn(rows, vocab, device="cuda").bfloat16()
    targets = torch.randint(vocab, (rows,), device="cuda")
    ones = torch.ones(rows, device="cuda")
    # One sequence; no old log-prob is so far away that a token is clipped and read but once.
    policy = (targets[None], None, torch.randn(1, rows, device="cuda"), ones[None])
    leaf = logits.clone().requires_grad_()
    stats = torch.ops.fastrlhf.token_stats(
        logits, targets, None, 1.0, None, 1.0, -100, False, False, "triton"
    )
    logprob, entropy, _, peak, log_norm = stats
    saved = (logits, targets, logprob, entropy, peak, log_norm, ones, None, None, 1.0, None, 1.0)
    size = logits.nbytes

    def eager() -> None:
        log_p = leaf.float().log_softmax(-1).gather(-1, targets[:, None])
        torch.autograd.grad(log_p.sum(), leaf)

    def fused() -> None:
        torch.autograd.grad(fastrlhf.token_logprobs(leaf, targets).sum(), leaf)

    ref_logits = logits + torch.randn_like(logits)

    def policy_loss() -> None:
        torch.autograd.grad(fastrlhf.logits_policy_loss(leaf[None], *policy)[0], leaf)

    def policy_loss_in_two_steps() -> None:
        logprobs = fastrlhf.token_logprobs(leaf[None], targets[None])
        torch.autograd.grad(fastrlhf.policy_loss(logprobs, *policy[1:])[0], leaf)

    return {
        "K1 statistics": (lambda: fastrlhf.token_logprobs(logits, targets), size),
        "K1 with entropy": (lambda: fastrlhf.token_stats(logits, targets, entropy=True), size),
        "K1 with softcap": (lambda: fastrlhf.token_logprobs(logits, targets, softcap=30.0), size),
        "K2 gradient": (
            lambda: torch.ops.fastrlhf.token_stats_backward(*saved, "triton"),
            2 * size,
        ),
        "K2 in place": (
            lambda: torch.ops.fastrlhf.token_stats_backward_(*saved, "triton"),
            2 * size,
        ),
        "forward + backward": (fused, 3 * size),
        "forward + backward, eager": (eager, 3 * size),
        "K3 policy loss, forward + backward": (policy_loss, 2 * size),
        "policy loss, K1 and K2": (policy_loss_in_two_steps, 3 * size),
        "KL of two logits": (lambda: fastrlhf.kl_divergence(logits, ref_logits), 2 * size),
        "KL, forward + backward": (
            lambda: torch.autograd.grad(fastrlhf.kl_divergence(leaf, ref_logits).sum(), leaf),
            5 * size,
        ),
        "Fisher product": (
            lambda: fastrlhf.softmax_fisher_product(logits, ref_logits),
            3 * size,
        ),
    }


def measure(bandwidth: float) -> list[dict]:
    """Time every operation at every shape, and its share of the limit."""
    results = []
    for rows in ROWS:
        for vocab in VOCABS:
            for name, (work, moved) in operations(rows, vocab).items():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                try:
                    work()
                    held = torch.cuda.max_memory_allocated() - before
                    ms = median_ms(work)
                except torch.OutOfMemoryError:
                    results.append({"operation": name, "rows": rows, "vocab": vocab, "ms": None})
                    continue
                limit = moved / bandwidth * 1e3
                row = {
                    "operation": name,
                    "rows": rows,
                    "vocab": vocab,
                    "ms": round(ms, 4),
                    "limit_ms": round(limit, 4),
                    "fraction_of_limit": round(limit / ms, 3),
                    "peak_mib": round(held / 2**20, 1),
                }
                results.append(row)
                print(row, flush=True)
            torch.cuda.empty_cache()
    return results


def linear_plans(rows: int = 8192, vocab: int = 128256, width: int = 4096) -> list[dict]:
    """Time the plans from hidden states; the limit is as many matmuls as a plan needs."""
    import fastrlhf

    hidden = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda") * 0.02).bfloat16()
    targets = torch.randint(vocab, (rows,), device="cuda")
    groups = torch.arange(rows, device="cuda") // 512
    with torch.no_grad():
        matmul = median_ms(lambda: hidden[:2048] @ weight.T) * rows / 2048

    def log_probs() -> None:
        hidden.grad = weight.grad = None
        fastrlhf.linear_token_logprobs(hidden, weight, targets).sum().backward()

    def grouped_loss() -> None:
        hidden.grad = weight.grad = None
        fastrlhf.linear_loss(
            lambda stats: -stats.logprob.sum(), hidden, weight, targets, groups=groups
        )[0].backward()

    def no_gradient() -> None:
        with torch.no_grad():
            fastrlhf.linear_token_logprobs(hidden, weight, targets)

    plans = [
        ("P0 log-probs, no gradient", no_gradient, False, 1),
        ("P1 log-probs, head frozen", log_probs, False, 2),
        ("P3 grouped loss, head trained", grouped_loss, True, 3),
        ("P4 log-probs, head trained", log_probs, True, 4),
    ]
    results = []
    for name, work, trained, matmuls in plans:
        weight.requires_grad_(trained)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = median_ms(work, rounds=7)
        limit = matmuls * matmul
        results.append(
            {
                "operation": name,
                "rows": rows,
                "vocab": vocab,
                "width": width,
                "ms": round(ms, 3),
                "limit_ms": round(limit, 3),
                "fraction_of_limit": round(limit / ms, 3),
                "peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1),
            }
        )
        print(results[-1], flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<name of the GPU>")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 1
    name = torch.cuda.get_device_name()
    output = arguments.output or ROOT / "benchmarks" / "results" / name.lower().replace(" ", "-")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        importable(folder)
        status = 0 if arguments.skip_tests else run_tests(output)
        bandwidth = copy_bandwidth()
        print(f"{name}: copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
        report = {
            "device": name,
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "copy_bytes_per_second": bandwidth,
            "tests_exit_status": None if arguments.skip_tests else status,
            "results": measure(bandwidth),
            "from_hidden_states": linear_plans(),
        }
    (output / "token_stats.json").write_text(json.dumps(report, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
