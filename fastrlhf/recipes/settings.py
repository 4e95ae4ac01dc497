"""The options that recipes share, and how they are read from a command line.

A recipe's options are a dataclass, as in transformers and TRL. Each field is an option of the
command line, which `HfArgumentParser` reads. The defaults are chosen for a run of a few minutes on
two CPU cores. The bounds of a number are part of its type: `steps: Positive`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T", bound="RunOptions")


class OptionError(ValueError):
    """An option is invalid by itself, or with the other options, files or devices.

    The message names the option.
    """


@dataclass(frozen=True)
class Bound:
    """The range of an option's values; `included` tells whether `least` is part of it."""

    least: float
    included: bool = True
    most: float = math.inf

    def check(self, name: str, value: float) -> None:
        """Raise ValueError if the value is out of range, infinite or NaN."""
        above = value > self.least or (self.included and value == self.least)
        if above and value <= self.most and value < math.inf:
            return
        expected = f"{self.least:g} or more" if self.included else f"more than {self.least:g}"
        if self == _POSITIVE:
            expected = "a positive number"
        if self.most < math.inf:
            expected += f", at most {self.most}"
        raise OptionError(f"argument --{name}: expected {expected}, got {value}")


_POSITIVE = Bound(1)
Positive = Annotated[int, _POSITIVE]
NonNegative = Annotated[int, Bound(0)]
TwoOrMore = Annotated[int, Bound(2)]
PositiveFloat = Annotated[float, Bound(0, included=False)]
NonNegativeFloat = Annotated[float, Bound(0)]
PositiveFloats = Annotated[list[float], Bound(0, included=False)]
NonNegativeFloats = Annotated[list[float], Bound(0)]
Share = Annotated[float, Bound(0, most=1)]
Seed = Annotated[int, Bound(0, most=2**31 - 1)]  # half of what NumPy takes: processes add to it


def check_option(name: str, hint: Any, value: Any) -> None:
    """Raise ValueError or TypeError if a value does not fit the type of its field."""
    choices = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in choices if kind is not NoneType)
        return None if value is None else check_option(name, hint, value)
    if get_origin(hint) is Literal and value not in choices:
        raise OptionError(f"argument --{name}: invalid choice: {value!r} (choose from {choices})")
    if get_origin(hint) is Annotated:
        kind, bound = choices
        for number in value if isinstance(value, list) else [value]:
            _check_type(name, int if kind is int else float, number)
            bound.check(name, number)
    elif hint in _WORDS:
        _check_type(name, hint, value)
    return None


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def _check_type(name: str, kind: type, value: Any) -> None:
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"argument --{name}: expected {_WORDS[kind]}, got {value!r}")


def option(default: Any, help: str) -> Any:
    """Make a field of a dataclass with a default and the text that `--help` shows."""
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunOptions:
    """Options of every run: the model, the output folder, the seed, the device, checkpoints."""

    model: str | None = option(
        None, "hub id, folder or GGUF file; without it the bundled SmolLM2-135M-Instruct"
    )
    output: str = option("", "folder; without it <recipe>-output")
    seed: Seed = option(0, "of prompts, adapters and samples: the same figures twice")
    device: str = option("auto", "auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    save_every: NonNegative = option(10, "steps between checkpoints; 0: none")
    resume: bool = option(False, "go on from the checkpoint in the output folder")

    def __post_init__(self) -> None:
        """Check every value against its type, and every number against the bound in its type."""
        hints = get_type_hints(type(self), include_extras=True)
        for one in fields(self):
            check_option(one.name, hints[one.name], getattr(self, one.name))


@dataclass
class SamplingOptions(RunOptions):
    """Options of sampling. The log-probs of training use the same temperature."""

    new_tokens: Positive = option(24, "a completion that is not over by then is cut")
    temperature: PositiveFloat = option(0.8, "of sampling, and so of the policy that is trained")
    batch_size: Positive = option(
        64, "sequences that are sampled or scored at once, outside the steps of training"
    )


@dataclass
class EvaluationOptions(SamplingOptions):
    """Options of the evaluation before, during and after training."""

    eval_prompts: Annotated[int, Bound(2, most=40)] = option(40, "held-out prompts, of 40")
    eval_completions: Positive = option(2, "completions of each of them")
    eval_every: NonNegative = option(0, "steps between evaluations on the way; 0: none")


@dataclass
class LoraOptions(RunOptions):
    """Options of the adapters that are trained."""

    lora_rank: Positive = option(16, "of the adapters")
    lora_targets: str | None = option(
        None, "all-linear, or a regular expression of layers; without it peft's choice"
    )


@dataclass
class AdapterOptions(LoraOptions):
    """Options of training adapters with AdamW."""

    learning_rate: PositiveFloat = option(2e-3, "of AdamW, after its rise falling to 0")
    warmup_steps: NonNegative = option(3, "over which the learning rate rises to that, linearly")
    max_grad_norm: PositiveFloat = option(1.0, "to which a longer gradient is cut")


def parse(options: type[T], arguments: Sequence[str] | None, recipe: str, description: str) -> T:
    """Read options from a command line. A wrong command line exits with argparse's message."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        (options,), prog=f"python -m fastrlhf.recipes.{recipe}", description=description
    )
    try:
        parsed, rest = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.output = parsed.output or f"{recipe}-output"
    return parsed
