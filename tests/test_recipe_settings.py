"""What a recipe can be told, and how it says that it cannot be told that."""

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import pytest

for name in ("transformers", "peft", "accelerate", "vaderSentiment", "matplotlib", "rich"):
    pytest.importorskip(name)

from fastrlhf.recipes import dpo  # noqa: E402
from fastrlhf.recipes.settings import (  # noqa: E402
    Bound,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RunOptions,
    option,
    parse,
)

UNCHECKED = pytest.mark.xfail(strict=True, reason="a bound beside None is not looked at")


@dataclasses.dataclass
class Options(RunOptions):
    """One option of each kind."""

    many: Positive = option(3, "at least 1")
    some_or_none: NonNegative = option(0, "at least 0")
    rate: PositiveFloat = option(0.5, "more than 0")
    weight: NonNegativeFloat = option(0.0, "0 or more")
    at_least_two: Annotated[int, Bound(2)] = option(2, "2 or more")
    above_minus_one: Annotated[float, Bound(-1, included=False)] = option(0.0, "more than -1")
    perhaps_many: Positive | None = option(None, "a number or nothing")
    perhaps_a_rate: PositiveFloat | None = option(None, "a float or nothing")
    on_by_default: bool = option(True, "can be turned off")
    off_by_default: bool = option(False, "can be turned on")
    kind: Literal["one", "other_one"] = option("one", "of two")


def kinds_of(options: type) -> dict[str, type]:
    """int, float or another type of each option, whether or not it may be None."""
    return {
        name: next((one for one in get_args(hint) if one in (int, float)), hint)
        for name, hint in get_type_hints(options).items()
    }


def bounds_of(options: type) -> dict[str, Bound]:
    """The bound of each option that has one."""
    found = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        for part in (hint, *get_args(hint)):
            for bound in getattr(part, "__metadata__", ()):
                found[name] = bound
    return found


def beyond(options: type) -> list:
    """Values that no option with a bound may have."""
    cases = []
    for name, bound in bounds_of(options).items():
        values = [bound.least - 1] if bound.included else [bound.least, bound.least - 1]
        if kinds_of(options)[name] is float:
            values += [math.nan, math.inf, -math.inf]
            values = [float(value) for value in values]
        marks = UNCHECKED if name.startswith("perhaps") else ()
        cases += [pytest.param(options, name, str(value), marks=marks) for value in values]
    return cases


def refused(capsys: pytest.CaptureFixture[str], options: type, *arguments: str) -> str:
    """What a command line that is refused says at last; nothing is written elsewhere."""
    with pytest.raises(SystemExit) as stopped:
        parse(options, list(arguments), "some", "A recipe.")
    assert stopped.value.code == 2
    shown, errors = capsys.readouterr()
    assert shown == "" and errors.startswith("usage: python -m fastrlhf.recipes.some ")
    last = errors.strip().splitlines()[-1]
    assert last.startswith("python -m fastrlhf.recipes.some: error: ")
    return last.removeprefix("python -m fastrlhf.recipes.some: error: ")


@pytest.mark.parametrize("options", [Options, dpo.DPOOptions])
def test_nothing_given_gives_the_defaults(options) -> None:
    parsed = parse(options, [], "some", "A recipe.")
    assert parsed == dataclasses.replace(options(), output="some-output")
    assert type(parsed) is options


def test_every_number_of_a_recipe_has_a_bound() -> None:
    kinds = kinds_of(dpo.DPOOptions)
    numbers = {name for name, kind in kinds.items() if kind in (int, float)}
    # Any seed is one; what the loss itself bounds is left to it.
    assert numbers - set(bounds_of(dpo.DPOOptions)) == {"seed", "label_smoothing"}
    assert {"steps", "temperature", "save_every", "eval_prompts"} <= set(bounds_of(dpo.DPOOptions))


@pytest.mark.parametrize(
    "options, name, value",
    [case for kind in (Options, dpo.DPOOptions) for case in beyond(kind)],
)
def test_values_beyond_a_bound(capsys, options, name, value) -> None:
    words = refused(capsys, options, f"--{name}={value}")
    found = re.fullmatch(rf"argument --{name}: expected (.+), got (.+)", words)
    assert found, words
    kind = kinds_of(options)[name]
    assert str(kind(found[2])) == str(kind(value))
    with pytest.raises(ValueError, match=f"^argument --{name}: expected {re.escape(found[1])}"):
        options(**{name: kind(value)})


@pytest.mark.parametrize("options", [Options, dpo.DPOOptions])
def test_values_at_a_bound(options) -> None:
    kinds = kinds_of(options)
    for name, bound in bounds_of(options).items():
        smallest = 1e-9 if kinds[name] is float else 1
        least = bound.least if bound.included else bound.least + smallest
        value = kinds[name](least)
        assert getattr(options(**{name: value}), name) == value
        assert getattr(parse(options, [f"--{name}={value}"], "some", ""), name) == value


@pytest.mark.parametrize(
    "bound, value, words",
    [
        (Bound(1), 0, "a positive number"),
        (Bound(0, included=False), 0.0, "more than 0"),
        (Bound(0), -0.5, "0 or more"),
        (Bound(2), 1, "2 or more"),
        (Bound(0), math.nan, "0 or more"),
        (Bound(0), math.inf, "0 or more"),
        (Bound(0.25, included=False), 0.25, "more than 0.25"),
    ],
)
def test_a_bound_says_what_it_expects(bound, value, words) -> None:
    with pytest.raises(ValueError, match=f"^argument --x: expected {words}, got {value}$"):
        bound.check("x", value)
    bound.check("x", None)
    bound.check("x", bound.least + 0.5)


@pytest.mark.parametrize(
    "name, value", [("many", "1.5"), ("many", "nan"), ("rate", "x"), ("seed", "1e3"), ("many", "")]
)
def test_what_is_no_number(capsys, name, value) -> None:
    words = refused(capsys, Options, f"--{name}", value)
    kind = "float" if name == "rate" else "int"
    assert words == f"argument --{name}: invalid {kind} value: '{value}'"


def test_a_number_that_may_be_left_out() -> None:
    given = parse(Options, ["--perhaps_many", "3", "--perhaps-a-rate=0.5"], "some", "")
    assert (given.perhaps_many, given.perhaps_a_rate) == (3, 0.5)
    left_out = parse(Options, [], "some", "")
    assert left_out.perhaps_many is None and left_out.perhaps_a_rate is None


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--some_or_none", "2"], 2),
        (["--some-or-none", "2"], 2),
        (["--some-or-none=2"], 2),
        (["--some-or-none", "1", "--some_or_none", "2"], 2),
    ],
)
def test_dashes_and_underscores_are_the_same(arguments, expected) -> None:
    assert parse(Options, arguments, "some", "").some_or_none == expected


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], (True, False)),
        (["--no_on_by_default"], (False, False)),
        (["--no-on-by-default"], (False, False)),
        (["--on_by_default", "false"], (False, False)),
        (["--on-by-default=no"], (False, False)),
        (["--on_by_default"], (True, False)),
        (["--off_by_default"], (True, True)),
        (["--off-by-default"], (True, True)),
        (["--off-by-default", "true"], (True, True)),
        (["--off-by-default", "0"], (True, False)),
    ],
)
def test_flags(arguments, expected) -> None:
    parsed = parse(Options, arguments, "some", "")
    assert (parsed.on_by_default, parsed.off_by_default) == expected


def test_flags_that_are_refused(capsys) -> None:
    words = refused(capsys, Options, "--resume", "perhaps")
    assert words.startswith("argument --resume: ") and "perhaps" in words
    words = refused(capsys, Options, "--on-by-default", "perhaps")
    assert words.startswith("argument --on_by_default/--on-by-default: ")
    assert refused(capsys, Options, "--no-resume") == "unrecognized arguments: --no-resume"


def test_choices(capsys) -> None:
    assert parse(Options, ["--kind", "other_one"], "some", "").kind == "other_one"
    words = refused(capsys, Options, "--kind", "third")
    assert words.startswith("argument --kind: ")
    assert all(part in words for part in ("third", "one", "other_one"))
    words = refused(capsys, dpo.DPOOptions, "--loss_type=none")
    assert words.startswith("argument --loss_type/--loss-type: ") and "sigmoid" in words
    assert parse(dpo.DPOOptions, ["--loss-type", "apo_zero"], "dpo", "").loss_type == "apo_zero"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--nothing", "3"], "--nothing 3"),
        (["word"], "word"),
        (["--many", "2", "--other=1", "stray"], "--other=1 stray"),
    ],
)
def test_unknown_arguments(capsys, arguments, named) -> None:
    assert refused(capsys, Options, *arguments) == f"unrecognized arguments: {named}"


def test_what_is_missing_after_an_option(capsys) -> None:
    assert refused(capsys, Options, "--many") == "argument --many: expected one argument"


def test_output_has_the_name_of_the_recipe() -> None:
    assert parse(Options, [], "other", "").output == "other-output"
    assert parse(Options, ["--output", "here"], "other", "").output == "here"


def test_help_shows_every_option_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Options, ["--help"], "some", "What it does.")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "What it does." in shown
    for field in dataclasses.fields(Options):
        assert f"--{field.name}" in shown
        assert field.metadata["help"].split(":")[0] in shown
    assert "more than 0 (default: 0.5)" in shown


def test_no_file_of_arguments_is_read(tmp_path: Path, monkeypatch) -> None:
    """HfArgumentParser would read one that has the name of the program."""
    (tmp_path / "program.args").write_text("--many 7", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program.py"), "--rate", "0.25"])
    parsed = parse(Options, None, "some", "")
    assert (parsed.many, parsed.rate) == (3, 0.25)


def test_the_recipe_reads_its_command_line(capsys, monkeypatch) -> None:
    given: list[dpo.DPOOptions] = []
    monkeypatch.setattr(dpo, "train", lambda options: given.append(options) or {"done": 1})
    assert dpo.main(["--steps", "3", "--learning-rate", "0.01", "--model", "here"]) == {"done": 1}
    expected = dpo.DPOOptions(steps=3, learning_rate=0.01, model="here", output="dpo-output")
    assert given == [expected]
    with pytest.raises(SystemExit) as stopped:
        dpo.main(["--steps", "0"])
    assert stopped.value.code == 2
    assert "argument --steps: expected a positive number, got 0" in capsys.readouterr().err
