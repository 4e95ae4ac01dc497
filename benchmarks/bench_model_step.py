"""A whole training step of SmolLM2-135M through this library, plain PyTorch and the peers.

    python benchmarks/bench_model_step.py [--losses SFT DPO GRPO] [--rounds N] [--output DIR]

Forward, loss and backward, with all parameters trained (the head is tied to the embeddings) and
with LoRA on attention. The optimizer's step, the same for all, is left out. What the batch is and
who takes part, `model_step.py` says. Each provider's loss and gradients must be as near to fp64 as
those of the plain formula, in the dtype and on the batch that are timed; who is not is not timed.
Those that are take turns. With --output it writes model-step.json and model-step.md; `--tiny` is
a tiny random model.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import environment
import measure
import report
import torch
from contest import TOLERANCE, Unavailable, Wrong, reason
from measure import Turn
from model_step import LOSSES, RANK, Step, make_model, make_step
from providers import Function
from torch import Tensor

from fastrlhf.recipes.memory import peak_memory

# How many times the plain formula's error another may have, beside a part of the tolerance: what
# the plain formula loses of a single number may be little by luck, and a pair's margin, on which
# all gradients of DPO depend alike, is one.
SLACK, FLOOR = 3.0, 0.1

Record = dict[str, Any]
Found = dict[str, Tensor]


def run(function: Function, step: Step) -> Tensor:
    """Compute, and leave the gradients in the parameters."""
    loss = function(step)
    loss.backward()
    return loss.detach()


def found_by(function: Function, step: Step) -> Found:
    """The loss and the gradients, which are gone from the parameters then."""
    found = {"loss": run(function, step)}
    for name, gradient in step.gradients().items():
        if gradient is None:
            raise Wrong(f"no gradient of {name}")
        found[f"gradient of {name}"] = gradient
    step.forget()
    return found


def errors(found: Found, exact: Found) -> dict[str, float]:
    """Relative errors of the loss and of each parameter's gradient."""
    return {
        name: float((found[name].double() - x).norm() / x.norm().clamp(min=1e-30))
        for name, x in exact.items()
    }


def check(found: Found, exact: Found, plain: dict[str, float], dtype: torch.dtype) -> float:
    """Compare with fp64, and return the largest error as a multiple of the plain formula's.

    Raises:
        Wrong: an error beyond what the plain formula's error allows.
    """
    worst, floor = 0.0, FLOOR * TOLERANCE[dtype]
    for name, error in errors(found, exact).items():
        # Not "greater": NaN must not pass.
        if not error <= SLACK * plain[name] + floor:
            raise Wrong(f"{name} off by {error:.1e}, the plain formula by {plain[name]:.1e}")
        if error > floor:
            worst = max(worst, error / plain[name])
    return worst


def contest(
    loss: str, step: Step, device: torch.device, rounds: int, *, compiling: bool = True
) -> list[Record]:
    """Check, count the memory of, and time the providers of a loss: a record each."""
    plain, providers = LOSSES[loss]
    dtype = step.base.dtype
    exact = found_by(plain, step.exact())
    plain_errors = errors(found_by(plain, step), exact)
    outcomes: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    processor: dict[str, list[float]] = {name: [] for name in providers}

    def work(function: Function, name: str) -> None:
        start = time.process_time()
        run(function, step)
        processor[name].append(time.process_time() - start)

    for name, provider in providers.items():
        try:
            if provider.gpu_only and device.type != "cuda":
                raise Unavailable("needs a GPU")
            if provider.compiles and not compiling:
                raise Unavailable("compiles")
            function = provider.load()
            if provider.compiles:
                found_by(function, step)
            found, peak = peak_memory(functools.partial(found_by, function, step), device)
            worst = check(found, exact, plain_errors, dtype)
            outcomes[name] = {"peak_mib": peak / 2**20, "worst_error_ratio": worst}
            turns[name] = Turn(functools.partial(work, function, name), step.forget)
        except Exception as error:  # whatever a provider raises is its outcome
            outcomes[name] = {"status": reason(error)}
        found = None
        step.forget()
    del exact
    times, failed = measure.take_turns(turns, device, 0.0, (rounds, rounds))
    outcomes |= {name: {"status": reason(error)} for name, error in failed.items()}
    for name, measured in times.items():
        low, median, high = (1e3 * x for x in measure.percentiles(measured))
        outcomes[name] |= {
            "status": "ok", "median_ms": median, "p20_ms": low, "p80_ms": high,
            "rounds": len(measured), "times_ms": [1e3 * x for x in measured],
            "processor_ms": 1e3 * statistics.median(processor[name][1:]),
        }  # fmt: skip
    sizes = _described(loss, step, device)
    return [sizes | {"provider": name} | outcomes[name] for name in providers]


def _described(loss: str, step: Step, device: torch.device) -> Record:
    vocab, width = step.base.lm_head.weight.shape
    return {
        "loss": loss,
        "trained": "all" if step.trained else f"LoRA of rank {RANK} on attention, head frozen",
        "device": device.type,
        "dtype": str(step.base.dtype).removeprefix("torch."),
        "sequences": len(step.ids),
        "tokens": step.ids.shape[1],
        "without_padding": int(step.attention.sum()),
        "scored": int(step.mask.sum()),
        "vocab": vocab,
        "width": width,
        "parameters": sum(x.numel() for x in step.base.parameters()),
    }


def tables(machine: dict[str, Any], records: list[Record]) -> str:
    """What was measured, a row a provider."""
    first = records[0]
    rows = []
    for (loss, trained), group in groupby(records, key=lambda r: (r["loss"], r["trained"])):
        members = list(group)
        clock = "processor_ms" if first["device"] == "cpu" else "median_ms"
        known = {r["provider"]: r[clock] for r in members if r["status"] == "ok"}
        for record in members:
            if record["status"] != "ok":
                rows.append([loss, trained, record["provider"], record["status"], "", "", "", ""])
                continue
            low, median, high = (f"{record[key]:.0f}" for key in ("p20_ms", "median_ms", "p80_ms"))
            ratios = (
                f"{record[clock] / known[name]:.2f}" if name in known else ""
                for name in ("eager", report.OURS)
            )
            cells = [f"{median} ({low} to {high})", f"{record['processor_ms']:.0f}", *ratios]
            cells.append(f"{record['peak_mib']:.0f}")
            rows.append([loss, trained, record["provider"], *cells])
    columns = ["loss", "trained", "provider", "ms", "processor, ms", "times eager",
               f"times {report.OURS}", "MiB"]  # fmt: skip
    return "\n".join(
        [
            f"# A training step of a model: {machine['device']}\n",
            report.measured_with(machine),
            _processor(machine),
            f"{first['parameters']:,} parameters, vocabulary {first['vocab']:,}, width "
            f"{first['width']}, {first['dtype']}; {first['sequences']} sequences of up to "
            f"{first['tokens']} tokens, {first['sequences'] * first['tokens']} with padding and "
            f"{first['without_padding']} without, of which {first['scored']} are scored.\n",
            _READING.format(rounds=min(r.get("rounds", 10**9) for r in records)),
            report.markdown(columns, rows),
        ]
    )


_READING = """\
Forward, loss and backward. Medians, with the 20th and the 80th percentile, of {rounds} rounds in
which the providers take turns. MiB: the peak of live tensors beyond model and batch, gradients
included. Each was checked against fp64 on this batch. "Packed" rows hold the same tokens without
padding. "Processor" is the median of the time that the processor's cores spent on it, all together:
on a CPU, whose cores may be shared, the multiples are of this; on a GPU they are of the time.
"""


def _processor(machine: dict[str, Any]) -> str:
    if machine.get("cuda"):
        return ""
    return (
        f"{machine['processor']}, {machine['capability']}. Other processes may have shared the "
        f"cores: the load average was {machine['load']:.1f} at the end.\n"
    )


def measured(arguments: argparse.Namespace, device: torch.device) -> list[Record]:
    """Hold the contests that the arguments ask for."""
    records: list[Record] = []
    for trained in (True, False):
        model = make_model(device, trained=trained, tiny=arguments.tiny)
        step = make_step(model, arguments.sequences, arguments.tokens)
        for loss in arguments.losses:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what peers and the compiler say
                of_loss = contest(
                    loss, step, device, arguments.rounds, compiling=not arguments.tiny
                )
            records += of_loss
            for record in of_loss:
                outcome = f"{record['median_ms']:.0f} ms" if "median_ms" in record else None
                said = [loss, record["trained"], record["provider"], outcome or record["status"]]
                print(": ".join(said), file=sys.stderr, flush=True)
    return sorted(records, key=lambda r: arguments.losses.index(r["loss"]))


def main() -> int:
    """Read the arguments, measure, and print the table unless somebody was wrong."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=["SFT", "DPO"])
    parser.add_argument("--rounds", type=int, default=20 if gpu else 3)
    parser.add_argument("--sequences", type=int, help="default: 4, on a GPU 16")
    parser.add_argument("--tokens", type=int, help="of the longest; default: 128, on a GPU 1024")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and batch")
    parser.add_argument("--output", type=Path, help="a folder for the JSON and the table")
    arguments = parser.parse_args()
    arguments.sequences = arguments.sequences or (16 if gpu and not arguments.tiny else 4)
    arguments.tokens = arguments.tokens or (16 if arguments.tiny else 1024 if gpu else 128)
    if arguments.sequences % 2 or arguments.sequences < 4 or arguments.tokens < 8:
        parser.error("pairs are needed, two at least, and 8 tokens")
    if arguments.rounds < 2:
        parser.error("two rounds are needed")
    try:
        records = measured(arguments, device)
    except Unavailable as error:
        parser.error(str(error))
    dtype = getattr(torch, records[0]["dtype"])
    machine = environment.describe(device, [dtype]) | {"load": os.getloadavg()[0]}
    text = tables(machine, records)
    if wrong := [r for r in records if r["status"].startswith("Wrong")]:
        for record in wrong:
            print(f"{record['loss']}, {record['provider']}: {record['status']}")
        return 1
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        result = json.dumps({"machine_info": machine, "records": records}, indent=1)
        (arguments.output / "model-step.json").write_text(result + "\n")
        (arguments.output / "model-step.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
