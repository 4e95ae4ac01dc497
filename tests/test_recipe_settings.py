"""What a recipe can be told, and how it says that it cannot be told that."""

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional, get_args, get_origin, get_type_hints

import pytest

for name in ("transformers", "peft", "accelerate", "vaderSentiment", "matplotlib", "rich"):
    pytest.importorskip(name)

from fastrlhf.recipes import distill, dpo, frontier, grpo, pipeline, ppo, reward, sft, trpo  # noqa: E402
from fastrlhf.recipes.prompts import HELD_OUT_PROMPTS  # noqa: E402
from fastrlhf.recipes.settings import (  # noqa: E402
    Bound,
    NonNegative,
    NonNegativeFloat,
    NonNegativeFloats,
    Positive,
    PositiveFloat,
    PositiveFloats,
    RunOptions,
    check_option,
    option,
    parse,
)


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
    two_to_five: Annotated[int, Bound(2, most=5)] = option(2, "2 to 5")
    share: Annotated[float, Bound(0, included=False, most=0.75)] = option(0.5, "a part")
    rates: PositiveFloats = option([0.5, 2.0], "each more than 0")
    weights: NonNegativeFloats = option([0.0], "each 0 or more")


# Of every recipe: pipelines of them have options of their own, too.
RECIPES = (
    dpo.DPOOptions, distill.DistillOptions, frontier.FrontierOptions, grpo.GRPOOptions,
    pipeline.PipelineOptions, ppo.PPOOptions, reward.RewardOptions, sft.SFTOptions,
    trpo.TRPOOptions,
)  # fmt: skip


def kinds_of(options: type) -> dict[str, type]:
    """int, float or another type of each option, of each number of a list, and beside None."""
    found = {}
    for name, hint in get_type_hints(options).items():
        parts = (hint, *get_args(hint))
        found[name] = next((one for one in parts if one in (int, float)), hint)
    return found


def bounds_of(options: type) -> dict[str, Bound]:
    """The bound of each option that has one."""
    found = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        for part in (hint, *get_args(hint)):
            for bound in getattr(part, "__metadata__", ()):
                found[name] = bound
    return found


def given(options: type, name: str, value: float) -> dict:
    """The option in Python: a list's last number is this one."""
    hint = get_type_hints(options)[name]
    return {name: [1.0, value] if get_origin(hint) is list else value}


def beyond(options: type) -> list:
    """Values that no option with a bound may have."""
    cases = []
    for name, bound in bounds_of(options).items():
        values = [bound.least - 1] if bound.included else [bound.least, bound.least - 1]
        if bound.most < math.inf:
            values.append(bound.most + 1)
        if kinds_of(options)[name] is float:
            values += [math.nan, math.inf, -math.inf]
            values = [float(value) for value in values]
        cases += [(options, name, str(value)) for value in values]
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


@pytest.mark.parametrize("options", [Options, *RECIPES])
def test_nothing_given_gives_the_defaults(options) -> None:
    parsed = parse(options, [], "some", "A recipe.")
    assert parsed == dataclasses.replace(options(), output="some-output")
    assert type(parsed) is options


@pytest.mark.parametrize("options", RECIPES)
def test_every_number_of_a_recipe_has_a_bound(options) -> None:
    numbers = {name for name, kind in kinds_of(options).items() if kind in (int, float)}
    assert {"seed", "save_every"} <= numbers == set(bounds_of(options))


@pytest.mark.parametrize(
    "options, name, least, most",
    [
        (RunOptions, "seed", 0, 2**31 - 1),
        (dpo.DPOOptions, "label_smoothing", 0, 0.49),
        (dpo.DPOOptions, "eval_prompts", 2, len(HELD_OUT_PROMPTS)),
    ],
)
def test_bounds_on_both_sides(options, name, least, most) -> None:
    for value in (least, most):
        assert getattr(options(**{name: value}), name) == value
    for value in (least - 1, most + 1, math.nextafter(most, 9e9) if most < 1 else most + 1):
        with pytest.raises(ValueError, match=f"^argument --{name}: expected {least} or more, at"):
            options(**{name: value})


@pytest.mark.parametrize(
    "options, name, value",
    [*beyond(Options), *beyond(dpo.DPOOptions), *beyond(frontier.FrontierOptions)],
)
def test_values_beyond_a_bound(capsys, options, name, value) -> None:
    words = refused(capsys, options, f"--{name}={value}")
    found = re.fullmatch(rf"argument --{name}: expected (.+), got (.+)", words)
    assert found, words
    kind = kinds_of(options)[name]
    assert str(kind(found[2])) == str(kind(value))
    with pytest.raises(ValueError, match=f"^argument --{name}: expected {re.escape(found[1])}"):
        options(**given(options, name, kind(value)))


@pytest.mark.parametrize("options", [Options, *RECIPES])
def test_values_at_a_bound(options) -> None:
    kinds = kinds_of(options)
    for name, bound in bounds_of(options).items():
        if options is reward.RewardOptions and name == "completions":
            continue  # of which there must be two
        smallest = 1e-9 if kinds[name] is float else 1
        least = bound.least if bound.included else bound.least + smallest
        for limit in {least, bound.most} - {math.inf}:
            value = kinds[name](limit)
            expected = given(options, name, value)[name]
            assert getattr(options(**{name: expected}), name) == expected
            words = [str(one) for one in (expected if isinstance(expected, list) else [value])]
            assert getattr(parse(options, [f"--{name}", *words], "some", ""), name) == expected


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
        (Bound(1, most=3), 4, "1 or more, at most 3"),
        (Bound(1, most=3), 0, "1 or more, at most 3"),
        (Bound(0, False, 0.5), 0.75, "more than 0, at most 0.5"),
        (Bound(0, most=0.5), math.nan, "0 or more, at most 0.5"),
    ],
)
def test_a_bound_says_what_it_expects(bound, value, words) -> None:
    with pytest.raises(ValueError, match=f"^argument --x: expected {words}, got {value}$"):
        bound.check("x", value)
    bound.check("x", bound.least + 0.5)


KIND = Literal["one", "two"]


@pytest.mark.parametrize(
    "hint, value",
    [
        (Positive, 3),
        (Positive | None, 3),
        (Positive | None, None),
        (Optional[PositiveFloat], None),  # noqa: UP045  what `get_type_hints` may say
        (PositiveFloat, 2),  # an int is a float
        (KIND, "two"),
        (KIND | None, None),
        (str | None, "any"),
        (PositiveFloats, [0.5, 1]),
        (NonNegativeFloats, [0.0]),
        (NonNegativeFloats, []),
        (bool, False),
    ],
)
def test_values_that_their_type_allows(hint, value) -> None:
    check_option("x", hint, value)


@pytest.mark.parametrize(
    "hint, value, error, words",
    [
        (Positive, 1.5, TypeError, "expected an integer, got 1.5"),
        (Positive, 2.0, TypeError, "expected an integer, got 2.0"),
        (Positive | None, 1.5, TypeError, "expected an integer, got 1.5"),
        (Positive | None, 0, ValueError, "expected a positive number, got 0"),
        (Optional[PositiveFloat], -1.0, ValueError, "expected more than 0, got -1.0"),  # noqa: UP045
        (KIND, "three", ValueError, "invalid choice: 'three' (choose from ('one', 'two'))"),
        (KIND | None, "three", ValueError, "invalid choice: 'three'"),
        (KIND, None, ValueError, "invalid choice: None"),
        (PositiveFloats, [1.0, 0.0], ValueError, "expected more than 0, got 0.0"),
        (PositiveFloats, [math.nan, 1.0], ValueError, "expected more than 0, got nan"),
        (NonNegativeFloats, [0.0, -0.5], ValueError, "expected 0 or more, got -0.5"),
    ],
)
def test_values_that_their_type_refuses(hint, value, error, words) -> None:
    with pytest.raises(error, match=f"^argument --x: {re.escape(words)}"):
        check_option("x", hint, value)


@pytest.mark.parametrize(
    "options, name, value, error",
    [
        (dpo.DPOOptions, "loss_type", "none", ValueError),
        (grpo.GRPOOptions, "loss_type", "ppo", ValueError),
        (dpo.DPOOptions, "steps", 2.5, TypeError),
        (RunOptions, "seed", 0.0, TypeError),
        (ppo.PPOOptions, "kl_target", -1.0, ValueError),
    ],
)
def test_options_given_in_python_are_checked(options, name, value, error) -> None:
    with pytest.raises(error, match=rf"^argument --{name}: "):
        options(**{name: value})


def test_several_numbers() -> None:
    parsed = parse(Options, ["--rates", "1", "0.5", "3", "--many=2"], "some", "")
    assert (parsed.rates, parsed.many) == ([1.0, 0.5, 3.0], 2)
    Options().rates.append(9.0)
    assert Options().rates == [0.5, 2.0]  # a list of its own for each


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
