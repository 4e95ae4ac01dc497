"""Contests of whole training steps: the check, the memory and the time of each entrant.

The loss and gradients of an entrant must be about as near to fp64 as those of the plain formula, in
the dtype and on the batch that are timed. Entrants that fail this check are not timed. The others
take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import environment
import measure
import report
import torch
from contest import TOLERANCE, Unavailable, Wrong, reason
from measure import Turn
from model_step import RANK, Step, make_model
from torch import Tensor, nn

from fastrlhf.recipes.memory import peak_memory

# An entrant's error may be SLACK times the error of the plain formula, plus FLOOR times the
# tolerance. The floor is needed because the plain formula's error of a single number may be small
# by luck. The margin of a pair, on which all gradients of DPO depend alike, is such a number.
SLACK, FLOOR = 3.0, 0.1

Record = dict[str, Any]
Found = dict[str, Tensor]
# A function that computes the loss and leaves the gradients in the parameters.
Work = Callable[[], Tensor]


class Entrant(NamedTuple):
    """A participant: how it is loaded, and an untimed context in which it is loaded and run."""

    load: Callable[[], Work]
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext
    compiles: bool = False


def with_backward(loss: Callable[[Step], Tensor], step: Step) -> Tensor:
    """Compute a loss and its backward, if it has one; gradients are left in the parameters."""
    value = loss(step)
    if value.requires_grad:  # if not, `found_by` tells whether a gradient is missing
        value.backward()
    return value.detach()


def found_by(work: Work, step: Step) -> Found:
    """Run the work, return its loss and gradients, and remove these from the parameters."""
    found = {"loss": work()}
    for name, gradient in step.gradients().items():
        if gradient is None:
            raise Wrong(f"no gradient of {name}")
        found[f"gradient of {name}"] = gradient
    step.forget()
    return found


def errors(found: Found, exact: Found) -> dict[str, float]:
    """Compute the relative errors of the loss and of each parameter's gradient."""
    return {
        name: float((found[name].double() - x).norm() / x.norm().clamp(min=1e-30))
        for name, x in exact.items()
    }


def check(found: Found, exact: Found, plain: dict[str, float], dtype: torch.dtype) -> float:
    """Compare with fp64, and return the largest error as a multiple of the plain formula's.

    Raises:
        Wrong: an error is larger than the plain formula's error allows.
    """
    worst, floor = 0.0, FLOOR * TOLERANCE[dtype]
    for name, error in errors(found, exact).items():
        # Written with "not <=", because ">" would let NaN pass.
        if not error <= SLACK * plain[name] + floor:
            raise Wrong(f"{name} off by {error:.1e}, the plain formula by {plain[name]:.1e}")
        if error > floor:
            worst = max(worst, error / plain[name])
    return worst


def hold(
    loss: str,
    plain: Callable[[Any], Tensor],
    entrants: Mapping[str, Entrant],
    step: Step,
    device: torch.device,
    rounds: int,
    further: Callable[[Work], Record] = lambda work: {},
) -> list[Record]:
    """Check the entrants, measure their memory and time, and return a record for each.

    The function `further` returns entries that are added to the record of an entrant's work.
    """
    dtype = step.base.dtype
    in_fp64 = step.exact()
    exact = found_by(functools.partial(with_backward, plain, in_fp64), in_fp64)
    del in_fp64
    plain_errors = errors(found_by(functools.partial(with_backward, plain, step), step), exact)
    outcomes: dict[str, Record] = {}
    turns: dict[str, Turn] = {}
    processor: dict[str, list[float]] = {name: [] for name in entrants}

    def timed(work: Work, name: str) -> None:
        start = time.process_time()
        work()
        processor[name].append(time.process_time() - start)

    for name, entrant in entrants.items():
        try:
            with entrant.around():
                work = entrant.load()
                if entrant.compiles:
                    found_by(work, step)
                found, peak = peak_memory(functools.partial(found_by, work, step), device)
                worst = check(found, exact, plain_errors, dtype)
                outcomes[name] = {"peak_mib": peak / 2**20, "worst_error_ratio": worst}
                outcomes[name] |= further(work)
            turns[name] = Turn(functools.partial(timed, work, name), step.forget, entrant.around)
        except Exception as error:  # any exception becomes the entrant's result
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
    return [sizes | {"provider": name} | outcomes[name] for name in entrants]


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


# The table.


def times_and_ratios(members: list[Record], compared: Iterable[str]) -> dict[str, list[str]]:
    """Write the table's cells for each record of a contest that was timed.

    The cells are its time, its processor time, and its multiples of the times of the providers with
    which it is compared.
    """
    clock = "processor_ms" if members[0]["device"] == "cpu" else "median_ms"
    timed = {r["provider"]: r for r in members if r["status"] == "ok"}
    cells = {}
    for name, record in timed.items():
        low, median, high = (f"{record[key]:.0f}" for key in ("p20_ms", "median_ms", "p80_ms"))
        ratios = [
            f"{record[clock] / timed[other][clock]:.2f}" if other in timed else ""
            for other in compared
        ]
        cells[name] = [f"{median} ({low} to {high})", f"{record['processor_ms']:.0f}", *ratios]
    return cells


def circumstances(machine: dict[str, Any], records: list[Record]) -> list[str]:
    """Describe the software, processor, model and batch of the measurements."""
    processor = "" if machine.get("cuda") else (
        f"{machine['processor']}, {machine['capability']}. Other processes may have shared the "
        f"cores: the load average was {machine['load']:.1f} at the end.\n"
    )  # fmt: skip
    first = records[0]
    dtypes = " and ".join(dict.fromkeys(record["dtype"] for record in records))
    model = (
        f"{first['parameters']:,} parameters, vocabulary {first['vocab']:,}, width "
        f"{first['width']}, {dtypes}; {first['sequences']} sequences of up to "
        f"{first['tokens']} tokens, {first['sequences'] * first['tokens']} with padding and "
        f"{first['without_padding']} without, of which {first['scored']} are scored.\n"
    )
    return [report.measured_with(machine), processor, model]


def fewest_rounds(records: list[Record]) -> int:
    """Return the smallest number of rounds of the records that were timed."""
    return min(record.get("rounds", 10**9) for record in records)


# The command.


def two_models(arguments: argparse.Namespace, device: torch.device) -> Iterator[nn.Module]:
    """Yield SmolLM2-135M twice: with all parameters trained, and with LoRA."""
    for trained in (True, False):
        yield make_model(device, trained=trained, tiny=arguments.tiny)


class Command(NamedTuple):
    """A command that holds contests of steps and writes their table."""

    description: str
    name: str  # begins the names of its files
    option: str  # the option that chooses contests
    choices: list[str]
    default: list[str]
    # Holds the contest of a given name on a model: returns a record for each entrant.
    contest: Callable[[str, nn.Module, argparse.Namespace, torch.device], list[Record]]
    tables: Callable[[dict[str, Any], list[Record]], str]
    # Yields the models, each of them prepared for its way of training.
    models: Callable[[argparse.Namespace, torch.device], Iterable[nn.Module]] = two_models


def run_command(command: Command) -> int:
    """Read the arguments, hold the contests, and print the table.

    If an entrant was wrong, only the errors are printed, and the exit code is 1.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = _arguments(command, gpu=device.type == "cuda")
    try:
        records = _measured(command, arguments, device)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    dtypes = [getattr(torch, x) for x in dict.fromkeys(record["dtype"] for record in records)]
    machine = environment.describe(device, dtypes) | {"load": os.getloadavg()[0]}
    text = command.tables(machine, records)
    if wrong := [r for r in records if r["status"].startswith("Wrong")]:
        for record in wrong:
            print(f"{record['loss']}, {record['provider']}: {record['status']}")
        return 1
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        result = json.dumps({"machine_info": machine, "records": records}, indent=1)
        (arguments.output / f"{command.name}.json").write_text(result + "\n")
        (arguments.output / f"{command.name}.md").write_text(text)
    return 0


def _arguments(command: Command, *, gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=command.description)
    parser.add_argument(
        command.option, dest="contests", nargs="+", choices=command.choices, default=command.default
    )
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
    return arguments


def _measured(
    command: Command, arguments: argparse.Namespace, device: torch.device
) -> list[Record]:
    records: list[Record] = []
    for model in command.models(arguments, device):
        for name in arguments.contests:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peers and of the compiler
                held = command.contest(name, model, arguments, device)
            records += held
            for record in held:
                outcome = f"{record['median_ms']:.0f} ms" if "median_ms" in record else None
                said = [
                    name,
                    record["trained"],
                    record["dtype"],
                    record["provider"],
                    outcome or record["status"],
                ]
                print(": ".join(said), file=sys.stderr, flush=True)
    return sorted(records, key=lambda r: arguments.contests.index(r["loss"]))
