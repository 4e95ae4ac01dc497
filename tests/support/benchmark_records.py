"""The benchmarks' modules, and records of contests that were not run."""

import csv
import importlib
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")

batch, contests, gpu, gpu_tests, losses, measure, providers, report, shapes = map(
    importlib.import_module,
    ("batch", "contest", "gpu", "gpu_tests", "losses", "measure", "providers", "report", "shapes"),
)
bench_model_step, bench_trainer, model_step, trainer_step = map(
    importlib.import_module, ("bench_model_step", "bench_trainer", "model_step", "trainer_step")
)
bench_lazy_logits, lazy_loops, lazy_overhead = map(
    importlib.import_module, ("bench_lazy_logits", "lazy_loops", "lazy_overhead")
)

FORWARD, BOTH = contests.FORWARD, contests.BOTH


def operation(name: str):
    return importlib.import_module(f"bench_{name}").OPERATION


def record(provider, vocab, median=None, fraction=0.5, kind=BOTH, **rest):
    described = {
        "operation": "PPO loss from logits", "kind": kind, "provider": provider, "device": "cpu",
        "dtype": "bfloat16", "sequences": 8, "tokens": 64, "rows": 512, "vocab": vocab, "width": 0,
        "prompt": 0.5, "central": vocab == 32000, "head": "",
    }  # fmt: skip
    if median is None:
        return described | {"status": "needs a GPU"} | rest
    times = {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.1 * median, "rounds": 9}
    return described | {"status": "ok", "peak_mib": 12.34, "fraction_of_limit": fraction} | times


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


TINY = {
    "lazy-logits": (
        bench_lazy_logits,
        ["bench_lazy_logits.py", "--tiny", "--loops", "SFT, labels=", "sigmoid, which builds"],
    ),
    "model-step": (bench_model_step, ["bench_model_step.py", "--tiny", "--losses", "DPO"]),
    "trainer": (bench_trainer, ["bench_trainer.py", "--tiny", "--trainers", "SFT"]),
}
