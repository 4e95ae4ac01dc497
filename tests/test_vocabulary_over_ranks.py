"""A vocabulary that ranks share, against one process that has all of it.

The ranks are processes that talk by gloo. Dims: W ranks, B sequences, T tokens, N = B·T, n of them
with a target, H width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import dtensors_over_ranks as dtensors
from support import vocabulary_over_ranks as over
from support.compare import (
    assert_as_accurate,
    assert_gradient_as_accurate,
    assert_gradient_close,
    relative_error,
)
from support.kept import everything, random_support
from support.rank_pool import RankPool
from support.vocabulary_over_ranks import (
    CUT,
    OF_LOGITS,
    OPERATIONS,
    Outcome,
    Problem,
    error_of_another_support,
    outcome,
)
from torch import Tensor

import fastrlhf

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("vocabulary"),
]

TIGHT = 1e-12  # fp64: what is left out or counted twice is wrong by percents
IMPLS = pytest.mark.parametrize("impl", ["eager", "triton"])
CUTS = {
    "2 uneven": (17, 12),
    "2, one column": (28, 1),
    "2, none first": (0, 21),
    "3 uneven": (3, 20, 6),
    "3, none in the middle": (9, 0, 12),
    "3, none last": (11, 10, 0),
    "4, one column": (1, 14, 1, 7),
    "4, two without": (0, 8, 0, 9),
}
B, T = 4, 3
PER_TOKEN = torch.linspace(0.5, 2.0, B * T, dtype=torch.float64).view(B, T)
PER_SEQUENCE = torch.tensor([0.6, 1.0, 1.7, 0.9])
EVERYTHING = ("is_top1", "mean_logit", "log_sum_sq_probs")
LINEAR = [name for name in OPERATIONS if name not in OF_LOGITS]
# The others are these, and what knows no backend.
WITH_KERNELS = ["token_stats", "linear_token_stats", "kl_divergence", "linear_kl_divergence"]
BOTH = [(name, "eager") for name in OPERATIONS] + [(name, "triton") for name in WITH_KERNELS]
BACKENDS = pytest.mark.parametrize("operation, impl", BOTH)
LINEAR_BACKENDS = pytest.mark.parametrize(
    "operation, impl", [(name, impl) for name, impl in BOTH if name in LINEAR]
)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def of_ranks(pool: RankPool, problem: Problem) -> list[Outcome]:
    return pool.run(outcome, problem, ranks=len(problem.sizes))


def joined(found: list[Outcome], problem: Problem) -> Outcome:
    """What the ranks found, as one: the same bits of values and of d_hidden, parts of the others,
    whose padding has no gradient.
    """
    whole = dict(found[0])
    for name in whole:
        dim = CUT.get(name.removeprefix("d_")) if name.startswith("d_") else None
        parts = [one[name] for one in found]
        if dim is None:
            for part in parts[1:]:
                assert torch.equal(part.nan_to_num(7.0), parts[0].nan_to_num(7.0)), name
            continue
        for rank, size in enumerate(problem.sizes):
            padding = parts[rank].narrow(dim, size, parts[rank].shape[dim] - size)
            assert not padding.any(), f"{name}: gradient of the padding"
            parts[rank] = parts[rank].narrow(dim, 0, size)
        whole[name] = torch.cat(parts, dim)
    return whole


def own_targets(problem: Problem) -> Tensor:
    """Targets (N,), below 0 where nothing counts."""
    x = problem.tensors()
    return torch.where(x["mask"], x["targets"], -1).flatten()


def assert_same(found: list[Outcome], whole: Outcome, problem: Problem) -> None:
    """Assert that values and gradients are those of the whole, in fp64, to a few roundings."""
    together = joined(found, problem)
    assert together.keys() == whole.keys()
    for name, expected in whole.items():
        got = together[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        if not name.startswith("d_"):
            size = float(expected.double().nan_to_num(0, 0, 0).abs().max()) if got.numel() else 0.0
            torch.testing.assert_close(got, expected, rtol=TIGHT, atol=TIGHT * size, msg=name)
        elif name == "d_logits" and "kl" not in problem.operation:
            vocab = got.shape[-1]
            assert_gradient_close(
                got.view(-1, vocab), expected.view(-1, vocab), own_targets(problem), TIGHT
            )
        else:
            assert_parts_same(name, got, expected, problem)


def assert_parts_same(name: str, got: Tensor, expected: Tensor, problem: Problem) -> None:
    """Each rank's part has its own norm, beside which it is right."""
    dim = CUT.get(name.removeprefix("d_"))
    sizes = problem.sizes
    pairs = [(got, expected)]
    if dim is not None:
        pairs = list(zip(got.split(sizes, dim), expected.split(sizes, dim), strict=True))
    for rank, (part, wanted) in enumerate(pairs):
        assert relative_error(part, wanted) < TIGHT, (name, rank)


def check(pool: RankPool, problem: Problem) -> Outcome:
    """Compare with one process; return what that finds."""
    eager = {name: x for name, x in problem.options.items() if name != "impl"}
    whole = outcome(None, replace(problem, options={**eager, "impl": "eager"}))
    assert_same(of_ranks(pool, problem), whole, problem)
    return whole


# Every operation, every cut.


@pytest.mark.parametrize(
    "impl, cut",
    [*(("eager", cut) for cut in CUTS), ("triton", "2, none first"), ("triton", "3 uneven")],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_and_gradients_are_those_of_the_whole(pool, operation, impl, cut) -> None:
    options: dict[str, Any] = {"impl": impl}
    if "stats" in operation or "policy" in operation or operation == "linear_loss":
        options["entropy"] = True
    whole = check(pool, Problem(operation, CUTS[cut], options, bias=len(CUTS[cut]) == 3))
    assert any(name.startswith("d_") and x.any() for name, x in whole.items())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("impl, cut", [("eager", "3, none in the middle"), ("triton", "3 uneven")])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if "kl" not in name])
def test_kept_ids_and_shared_rows(pool, operation, impl, cut, shared) -> None:
    """Each rank has the logits of its own of the kept ids, and what all say of a token is one."""
    options: dict[str, Any] = {"impl": impl}
    if "stats" in operation or "policy" in operation or operation == "linear_loss":
        options["entropy"] = True
    shared &= operation not in OF_LOGITS
    problem = Problem(operation, CUTS[cut], options, bias=len(CUTS[cut]) == 3)
    targets = own_targets(problem)
    options["support"] = random_support(targets, sum(CUTS[cut]))
    if shared:
        options["rows"] = torch.arange(B * T).view(B, T) // 2
    whole = check(pool, problem)
    assert any(name.startswith("d_") and x.any() for name, x in whole.items())


def test_ranks_that_keep_other_ids_say_so(pool) -> None:
    found = pool.run(error_of_another_support, Problem("linear_token_stats", (5, 6)), ranks=2)
    for text in found:
        assert "group: expected the same tokens to score" in text


STATS = [
    {"softcap": 1.5, "scale": 0.7, "temperature": 0.6, "entropy": True},
    {"temperature": PER_TOKEN, "entropy": True, "entropy_grad": False},
    {"temperature": PER_SEQUENCE, "softcap": 2.0, "with_stats": EVERYTHING, "entropy": True},
    {"with_stats": EVERYTHING, "scale": 1.3},
    {"with_stats": ("mean_logit",), "temperature": PER_TOKEN},
    {"with_stats": ("is_top1",), "entropy": True},
    {"ignore_index": 0},
    {"ignore_index": -1, "entropy": True},
    {"ignore_index": -2},
]
POLICY = [
    {"ratio_level": "sequence", "reduction": "sequence-mean"},
    {"entropy_coef": 0.1, "kl_coef": 0.2, "temperature": PER_SEQUENCE},
    {"surrogate": "cispo", "softcap": 1.5, "temperature": PER_TOKEN, "entropy": True},
    {"ratio_level": "sequence", "entropy_coef": 0.1, "surrogate": "sapo", "scale": 0.5},
]
DPO = [
    {"loss_type": "ipo", "temperature": PER_SEQUENCE},
    {"loss_type": "robust", "label_smoothing": 0.1, "softcap": 2.0},
    {"loss_type": "aot"},
    {"loss_type": "simpo", "beta": 2.0},
    {"loss_type": "cpo", "scale": 0.7},
    {"loss_type": "orpo"},
]
CROSS_ENTROPY = [
    {"label_smoothing": 0.1, "z_loss": 0.01},
    {"label_smoothing": 0.2, "softcap": 1.5, "scale": 1.2, "temperature": PER_TOKEN},
    {"label_smoothing": 0.1, "reduction": "none"},
    {"z_loss": 0.01, "reduction": "sum", "ignore_index": -1},
    {"loss_type": "dft", "z_loss": 0.01, "weights": PER_TOKEN},
]
KL = [
    {"direction": "forward", "temperature": PER_TOKEN},
    {"direction": "jsd", "beta": 0.3, "softcap": 1.5, "scale": 0.8},
    {"direction": "reverse", "softcap": 2.0, "temperature": PER_SEQUENCE},
]
LINEAR_KL = [
    *KL,
    {"direction": "reverse", "softcap": 1.5, "ref_softcap": None, "ref_scale": 0.7},
    {"direction": "forward", "scale": 0.8, "ref_softcap": 2.0, "temperature": PER_TOKEN},
    {"direction": "jsd", "softcap": 1.5, "ref_softcap": 2.5, "ref_scale": 1.2, "beta": 0.7},
]
LOSS = [
    {"entropy": True, "temperature": PER_TOKEN, "softcap": 1.5},
    {"groups": torch.arange(B)[:, None].expand(B, T).contiguous(), "scale": 0.7},
]
VARIANTS = [
    (operation, options)
    for operations, some in (
        (("token_stats", "linear_token_stats"), STATS),
        (("token_logprobs", "linear_token_logprobs"), [{"temperature": PER_TOKEN, "softcap": 1.5}]),
        (("logits_policy_loss", "linear_policy_loss"), POLICY),
        (("linear_dpo_loss",), DPO),
        (("cross_entropy", "linear_cross_entropy"), CROSS_ENTROPY),
        (("kl_divergence",), KL),
        (("linear_kl_divergence",), LINEAR_KL),
        (("linear_loss",), LOSS),
    )
    for operation in operations
    for options in some
]
PACKED = {"cu_seqlens": torch.arange(0, B * T + 1, T), "temperature": PER_SEQUENCE}
VARIANTS += [
    (operation, PACKED)
    for operation in ("logits_policy_loss", "linear_policy_loss", "linear_dpo_loss")
]


def name_of(x: Any) -> str:
    """Options as the name of a test."""
    if isinstance(x, tuple) and isinstance(x[-1], dict):
        return f"{x[0]} {name_of(x[-1])}"
    if not isinstance(x, dict):
        return str(x)
    return ",".join(
        f"{name}={'tensor' if isinstance(value, Tensor) else value}" for name, value in x.items()
    )


@pytest.mark.parametrize(
    "number, impl",
    [
        (i, impl)
        for i, (operation, _) in enumerate(VARIANTS)
        for impl in ("eager", "triton")
        if impl == "eager" or i % 3 == 0 or operation in OF_LOGITS
    ],
    ids=lambda x: name_of(VARIANTS[x]) if isinstance(x, int) else x,
)
def test_options_mean_what_they_mean_in_one_process(pool, number, impl) -> None:
    operation, options = VARIANTS[number]
    # The interpreter takes its time: three ranks at most.
    cuts = [cut for cut in CUTS.values() if impl == "eager" or len(cut) < 4]
    chunks = {"chunk_size": 5} if operation in LINEAR else {}
    problem = Problem(
        operation, cuts[number % len(cuts)], {**options, **chunks, "impl": impl},
        bias=number % 2 == 0,
    )  # fmt: skip
    check(pool, problem)


TRAINED = {
    "hidden": ("hidden", "ref_hidden"),
    "weight": ("weight", "ref_weight"),
    "bias": ("bias",),
    "hidden and weight of one side": ("hidden", "weight"),
    "hidden of one side, weight of the other": ("hidden", "ref_weight"),
    "nothing": (),
}


@pytest.mark.parametrize("trained", TRAINED)
@LINEAR_BACKENDS
def test_whatever_is_frozen_the_rest_has_its_gradient(pool, operation, trained, impl) -> None:
    weights = "alike" if len(trained) % 2 else "uneven"
    entropy = {"entropy": True} if operation in ("linear_token_stats", "linear_loss") else {}
    problem = Problem(
        operation, CUTS["3 uneven"], {"impl": impl, "chunk_size": 4, **entropy}, bias=True,
        trained=TRAINED[trained], weights=weights,
    )  # fmt: skip
    whole = check(pool, problem)
    gradients = {name.removeprefix("d_") for name in whole if name.startswith("d_")}
    assert gradients == set(problem.leaves())


@pytest.mark.parametrize("operation", LINEAR)
def test_ranks_cut_the_same_blocks_however_many_columns_they_have(pool, operation) -> None:
    problem = Problem(operation, (3, 20, 6), {"impl": "eager"}, batch=(4, 5))
    assert_same(
        pool.run(over.outcome_in_little_memory, problem, ranks=3), outcome(None, problem), problem
    )


@BACKENDS
def test_a_padded_vocabulary_has_no_gradient_in_its_padding(pool, operation, impl) -> None:
    # As users have it: equal shares, of which the last ranks narrow theirs to what is real.
    problem = Problem(operation, (9, 9, 5, 0), {"impl": impl}, padding=(0, 0, 4, 9), bias=True)
    check(pool, problem)


@IMPLS
def test_targets_of_one_rank_alone_and_narrow_ones(pool, impl) -> None:
    for operation in ("token_stats", "linear_token_stats", "linear_policy_loss"):
        spoils = ("narrow_targets", "one_owner")
        check(pool, Problem(operation, CUTS["3 uneven"], {"impl": impl}, spoils=spoils))


@IMPLS
@pytest.mark.parametrize("operation", ["token_stats", "linear_loss"])
def test_targets_at_the_borders_of_parts(pool, operation, impl) -> None:
    spoils = ("at_borders", "none_ignored")
    for cut in ("3 uneven", "2, one column"):
        check(pool, Problem(operation, CUTS[cut], {"impl": impl}, spoils=spoils))


@IMPLS
@pytest.mark.parametrize("operation", ["token_stats", "linear_token_stats"])
def test_the_entropy_may_be_all_that_is_differentiated(pool, operation, impl) -> None:
    problem = Problem(operation, CUTS["3 uneven"], {"impl": impl, "entropy": True})
    for trained in (None, ("hidden",)) if operation in LINEAR else (None,):
        check(pool, replace(problem, trained=trained, weights="entropy alone"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_rank_has_all_of_it(pool, operation) -> None:
    check(pool, Problem(operation, (19,), {"impl": "eager"}, bias=True))


@pytest.mark.parametrize("operation", [name for name in LINEAR if "kl" not in name])
def test_a_weight_in_codes(pool, operation) -> None:
    for cut in ("3 uneven", "3, none in the middle"):
        problem = Problem(operation, CUTS[cut], {"impl": "eager", "chunk_size": 5})
        whole = over.with_codes(None, problem)
        assert whole["d_hidden"].any()
        assert_same(pool.run(over.with_codes, problem, ranks=3), whole, problem)


@IMPLS
def test_a_reference_of_another_dtype(pool, impl) -> None:
    options, spoils = {"direction": "jsd", "impl": impl}, ("reference_in_fp32",)
    check(
        pool,
        Problem("kl_divergence", CUTS["3 uneven"], options, trained=("logits",), spoils=spoils),
    )


def test_two_groups_at_once_each_with_a_vocabulary_of_its_own(pool) -> None:
    for operation in ("token_stats", "linear_loss", "linear_kl_divergence"):
        problem = Problem(operation, CUTS["2 uneven"])
        found = pool.run(over.in_pairs, problem, ranks=4)
        for pair in (found[:2], found[2:]):
            assert_same(pair, outcome(None, problem), problem)


@IMPLS
def test_the_log_prob_of_a_near_certain_token_keeps_its_accuracy(pool, impl) -> None:
    for cut in ("2 uneven", "4, one column"):
        options = {"impl": impl, "entropy": True, "with_stats": EVERYTHING}
        problem = Problem("token_stats", CUTS[cut], options, spoils=("certain",))
        whole = check(pool, problem)
        found = joined(of_ranks(pool, problem), problem)
        assert -1e-9 < whole["logprob"].max() <= 0
        for name in ("logprob", "log_sum_sq_probs"):
            torch.testing.assert_close(found[name], whole[name], rtol=1e-10, atol=0)


@IMPLS
def test_of_equal_logits_the_first_of_the_whole_vocabulary_is_on_top(pool, impl) -> None:
    options = {"impl": impl, "with_stats": EVERYTHING}
    for cut in CUTS:
        if impl == "triton" and cut not in ("2, none first", "4, one column"):
            continue
        problem = Problem("token_stats", CUTS[cut], options, spoils=("none_ignored", "ties"))
        x, found = problem.tensors(), joined(of_ranks(pool, problem), problem)
        expected = x["logits"].argmax(-1) == x["targets"]
        assert torch.equal(found["is_top1"], expected)
        assert expected.any() and not expected.all()


# Hostile numbers.


HOSTILE = [
    ("minus_inf_on_first",), ("minus_inf_on_last",), ("minus_inf_scattered",),
    ("rows_of_nothing",), ("nan_on_last",), ("plus_inf",), ("large",), ("garbage",),
    ("all_ignored",), ("all_ignored", "garbage"), ("rows_of_nothing", "minus_inf_on_first"),
]  # fmt: skip


def assert_alike(found: list[Outcome], whole: Outcome, problem: Problem) -> None:
    """The same numbers, of which some are not finite."""
    for name, got in joined(found, problem).items():
        expected = whole[name]
        size = float(expected.double().nan_to_num(0, 0, 0).abs().max()) if got.numel() else 0.0
        torch.testing.assert_close(
            got, expected, rtol=1e-10, atol=1e-12 * size, equal_nan=True, msg=f"{name}: {got}"
        )


@IMPLS
@pytest.mark.parametrize("spoils", HOSTILE, ids=" ".join)
@pytest.mark.parametrize("operation", ["token_stats", "logits_policy_loss", "kl_divergence"])
def test_hostile_logits_give_what_one_process_gives(pool, operation, spoils, impl) -> None:
    options: dict[str, Any] = {"impl": impl}
    if operation == "token_stats":
        options |= {"entropy": True, "with_stats": EVERYTHING}
    if operation == "kl_divergence":
        options["direction"] = "jsd" if len(spoils) == 2 else "reverse"
    cuts = ["3, none in the middle"] + ["4, one column"] * (impl == "eager")
    for cut in cuts:
        problem = Problem(operation, CUTS[cut], options, spoils=spoils)
        # One process, by the same backend: what +inf gives is not promised.
        whole = outcome(None, problem)
        assert_alike(of_ranks(pool, problem), whole, problem)
        if "garbage" in spoils or "all_ignored" in spoils:
            assert all(x.isfinite().all() for x in whole.values())


@pytest.mark.parametrize("spoils", [("large",), ("garbage",), ("all_ignored",)], ids=" ".join)
@LINEAR_BACKENDS
def test_hostile_hidden_states_give_what_one_process_gives(pool, operation, spoils, impl) -> None:
    problem = Problem(operation, CUTS["3 uneven"], {"impl": impl}, spoils=spoils)
    assert_alike(of_ranks(pool, problem), outcome(None, problem), problem)


@IMPLS
def test_no_tokens_at_all(pool, impl) -> None:
    for operation in ("token_stats", "linear_token_stats", "kl_divergence", "linear_kl_divergence"):
        for batch in ((0, 3), (3, 0)):
            problem = Problem(operation, (4, 0, 5), {"impl": impl}, batch=batch)
            check(pool, problem)


# Accuracy in the dtypes that people use, and bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BACKENDS
def test_they_are_as_accurate_as_one_process(pool, operation, dtype, impl) -> None:
    entropy = {"entropy": True} if "stats" in operation else {}
    problem = Problem(
        operation, CUTS["3 uneven"], {"impl": impl, **entropy}, dtype, bias=True, spread=3.0
    )
    plain = outcome(None, replace(problem, options={"impl": "eager", **entropy}))
    exact = outcome(None, problem, wide=True)
    together = joined(of_ranks(pool, problem), problem)
    for name, got in together.items():
        assert got.dtype == (dtype if name.startswith("d_") else plain[name].dtype)
        numbers = got, plain[name], exact[name]
        if name == "d_logits" and "kl" not in operation:
            rows = (x.view(B * T, -1) for x in numbers)
            assert_gradient_as_accurate(*rows, own_targets(problem))
        else:
            # Values are differences of logits, and gradients sums of terms that may cancel.
            size = max(10.0, float(exact[name].abs().max())) if not name.startswith("d_") else None
            assert_as_accurate(*numbers, size=size, of=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "operation, kept",
    [
        ("linear_token_stats", False), ("linear_kl_divergence", False), ("linear_loss", False),
        ("linear_token_stats", True),
    ],
)  # fmt: skip
def test_gradients_that_cancel_are_rounded_after_they_are_added(
    pool, operation, dtype, kept
) -> None:
    problem = Problem(
        operation, CUTS["3 uneven"], {"impl": "eager"}, dtype, trained=("hidden",),
        spoils=("alike_but_for_little",),
    )  # fmt: skip
    if kept:
        problem.options["support"] = everything(B * T, 29)
    plain, exact = outcome(None, problem), outcome(None, problem, wide=True)
    for found in of_ranks(pool, problem):
        assert_as_accurate(found["d_hidden"], plain["d_hidden"], exact["d_hidden"])


@BACKENDS
def test_the_same_bits_from_run_to_run(pool, operation, impl) -> None:
    problem = Problem(
        operation, CUTS["4, one column"], {"impl": impl}, torch.float32, bias=True
    )  # fmt: skip
    first, again = of_ranks(pool, problem), of_ranks(pool, problem)
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(x, other[name]) for name, x in one.items())


@IMPLS
def test_whatever_the_cut_values_differ_by_a_few_roundings(pool, impl) -> None:
    # Of V terms of a sum in another order, and of the largest logit: 8 roundings of what is added.
    options = {"impl": impl, "entropy": True, "with_stats": EVERYTHING}
    cuts = [(24, 0), (0, 24), (12, 12), (1, 22, 1), (6, 6, 6, 6), (0, 23, 1, 0)]
    found = []
    for cut in cuts:
        problem = Problem("token_stats", cut, options, torch.float32, spread=5.0)
        found.append(joined(of_ranks(pool, problem), problem))
    size = float(problem.tensors()["logits"].abs().max())
    for other in found[1:]:
        for name in ("logprob", "entropy", "lse", "mean_logit", "log_sum_sq_probs"):
            apart = float((other[name] - found[0][name]).abs().max())
            assert apart <= 8 * torch.finfo(torch.float32).eps * max(size, 1.0), name
        assert torch.equal(other["is_top1"], found[0]["is_top1"])
    # Of columns of one rank alone, nothing is added to anything.
    for name in found[0]:
        if not name.startswith("d_"):
            assert torch.equal(found[0][name], found[1][name]), name


@IMPLS
def test_inplace_backward_spends_the_logits_of_this_rank(pool, impl) -> None:
    problem = Problem("token_stats", CUTS["3 uneven"], {"impl": impl})
    found = pool.run(over.spent_logits, problem, ranks=3)
    for _, overwritten, said in found:
        assert overwritten
        assert "modified by an inplace operation" in said
    whole = outcome(None, replace(problem, options={"impl": "eager"}, weights="uneven"))
    gradients = torch.cat([one["d_logits"] for one, _, _ in found], -1)
    assert relative_error(gradients, whole["d_logits"]) < TIGHT


# What is sent, and what is computed.


GATHER, REDUCE = "allgather_base", "allreduce"
# Before anything else: how many columns a rank has, of what, and what is asked of which tokens.
SIZE, AGREED, AGREED_OF_HEADS = 8, 6 * 8, 7 * 8


def sent(pool: RankPool, problem: Problem) -> tuple[list, list]:
    """What each rank gives to collectives, which is the same on all."""
    found = pool.run(over.with_sent_bytes, problem, ranks=len(problem.sizes))
    assert all(one == found[0] for one in found)
    return found[0]


@IMPLS
@pytest.mark.parametrize(
    "options, numbers",
    [
        ({}, 3), ({"entropy": True}, 4), ({"with_stats": ("mean_logit",)}, 4),
        ({"with_stats": ("log_sum_sq_probs",)}, 4), ({"with_stats": EVERYTHING}, None),
        ({"with_stats": ("is_top1",), "entropy": True}, None),
    ],
    ids=name_of,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_send_a_few_numbers_a_token_and_nothing_backward(
    pool, options, numbers, dtype, impl
) -> None:
    problem = Problem(
        "token_stats", (9, 40, 0), {"impl": impl, **options}, dtype, spoils=("none_ignored",)
    )
    if numbers is None:  # is_top1 takes the kernels two, and the eager backend one
        is_top1 = 2 if impl == "triton" else 1
        numbers = 3 + is_top1 + (2 if "mean_logit" in options["with_stats"] else 1)
    number = 8 if dtype == torch.float64 else 4
    forward, backward = sent(pool, problem)
    assert forward == [(GATHER, AGREED), (GATHER, numbers * number * B * T)]
    assert backward == []


@IMPLS
def test_ignored_tokens_of_logits_send_no_more_than_others(pool, impl) -> None:
    problem = Problem("token_stats", (9, 40, 0), {"impl": impl}, torch.float32)
    forward, _ = sent(pool, problem)
    live = int(problem.tensors()["mask"].sum())
    assert forward[1:] == [(GATHER, 12 * (B * T if impl == "triton" else live))]


@IMPLS
@pytest.mark.parametrize("direction, numbers", [("reverse", 7), ("forward", 7), ("jsd", 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_send_seven_or_eight_numbers_a_token(
    pool, direction, numbers, dtype, impl
) -> None:
    options = {"impl": impl, "direction": direction}
    forward, backward = sent(pool, Problem("kl_divergence", (9, 0, 40), options, dtype))
    number = dtype.itemsize * B * T
    parts = [(GATHER, 4 * number), (GATHER, (numbers - 4) * number)]
    assert forward == [(GATHER, AGREED), *parts]
    assert backward == []


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["P0", "P1", "P2", "P4", "weight alone"])
def test_hidden_states_send_what_live_tokens_have_and_one_gradient(pool, plan, dtype, impl) -> None:
    operation = "linear_loss" if plan == "P2" else "linear_token_stats"
    trained = {"P0": (), "P1": ("hidden",), "weight alone": ("weight",)}.get(plan)
    problem = Problem(
        operation, (9, 0, 40), {"impl": impl, "chunk_size": 3}, dtype, trained=trained
    )
    live = int(problem.tensors()["mask"].sum())
    forward, backward = sent(pool, problem)
    assert forward[:2] == [(GATHER, SIZE), (GATHER, AGREED_OF_HEADS)]
    assert sum(size for kind, size in forward[2:] if kind == GATHER) == 12 * live
    assert not any(kind == GATHER for kind, _ in backward)
    reduced = [size for kind, size in forward + backward if kind == REDUCE]
    rows = {"P0": 0, "weight alone": 0}.get(plan, live)
    assert sum(reduced) == 4 * rows * problem.width
    assert {kind for kind, _ in forward + backward} <= {GATHER, REDUCE}


@IMPLS
@pytest.mark.parametrize("direction, numbers", [("reverse", 7), ("jsd", 8)])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "ref_weight"), ("hidden", "weight")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergences_of_hidden_states_send_the_same_of_live_tokens(
    pool, trained, direction, numbers, dtype, impl
) -> None:
    options = {"impl": impl, "direction": direction, "chunk_size": 4}
    problem = Problem("linear_kl_divergence", (9, 0, 40), options, dtype, trained=trained)
    forward, backward = sent(pool, problem)
    live = int(problem.tensors()["mask"].sum())
    number = 4 * live
    assert forward[:2] == [(GATHER, SIZE), (GATHER, AGREED_OF_HEADS)]
    assert sum(size for kind, size in forward[2:] if kind == GATHER) == numbers * number
    assert not any(kind == GATHER for kind, _ in backward)
    reduced = [size for kind, size in forward + backward if kind == REDUCE]
    assert sum(reduced) == 4 * live * problem.width


@BACKENDS
def test_nothing_of_the_size_of_the_logits_is_ever_sent(pool, operation, impl) -> None:
    problem = Problem(operation, (40, 50), {"impl": impl}, torch.float32, bias=True)
    forward, backward = sent(pool, problem)
    assert forward
    # Of 90 columns nobody sends as many as 10.
    assert max(size for _, size in forward + backward) < 10 * B * T * 4


@pytest.mark.parametrize("cut", ["3 uneven", "3, none in the middle"])
@pytest.mark.parametrize(
    "plan, operation, trained, matmuls",
    [
        ("P0", "linear_token_stats", (), 1), ("P1", "linear_token_stats", ("hidden",), 2),
        ("P2", "linear_loss", ("hidden", "weight"), 3), ("P2", "linear_loss", ("hidden",), 2),
        ("P2", "linear_cross_entropy", ("hidden", "weight"), 3),
        ("P3", "linear_dpo_loss", ("hidden", "weight"), 3),
        ("P4", "linear_token_stats", ("hidden", "weight"), 4),
        ("P4", "linear_token_stats", ("weight",), 3),
        ("KL", "linear_kl_divergence", (), 2), ("KL", "linear_kl_divergence", ("hidden",), 3),
        ("KL", "linear_kl_divergence", ("hidden", "weight"), 4),
    ],
)  # fmt: skip
def test_each_rank_does_its_share_of_the_matmuls(
    pool, plan, operation, trained, matmuls, cut
) -> None:
    problem = Problem(operation, CUTS[cut], {"impl": "eager"}, trained=trained, weights="alike")
    found = pool.run(over.matmul_operations, problem, ranks=3)
    live = int(problem.tensors()["mask"].sum())
    assert found == [matmuls * 2 * live * size * problem.width for size in problem.sizes]


# What is refused.


def test_what_ranks_do_not_agree_on_is_named(pool) -> None:
    both = [Problem("token_stats", (4, 5)), Problem("kl_divergence", (4, 5))]
    both += [Problem(operation, (4, 5)) for operation in LINEAR]
    for said in pool.run(over.raises, both, {1: {"batch": (4, 2)}}, ranks=2):
        for one in said:
            assert one.startswith("ValueError: group: expected the same number of tokens on every")
            assert one.endswith("got [12, 8]")
    chunked = {1: {"options": {"chunk_size": 7}}}
    for said in pool.run(over.raises, both[2:], chunked, ranks=2):
        for one in said:
            assert one.startswith("ValueError: group: expected the same chunk_size on every rank")
    # On what is asked it depends what is sent, and so whether a rank would wait for ever.
    for changed in ({"trained": ("weight",)}, {"options": {"entropy": True}}):
        some = Problem("linear_token_stats", (4, 5))
        for said in pool.run(over.raises, [some], {1: changed}, ranks=2):
            assert said[0].startswith("ValueError: group: expected the same question")
    for said in pool.run(over.raises, both, {1: {"spoils": ("none_ignored",)}}, ranks=2):
        for one in said:
            assert one.startswith("ValueError: group: expected the same ")
            assert "tokens to score" in one or "number of tokens" in one


def test_an_empty_vocabulary_is_refused(pool) -> None:
    for said in pool.run(over.raises_without_columns, list(OPERATIONS), ranks=2):
        for one in said:
            assert one == "ValueError: group: expected a vocabulary, got 0 columns on every rank"


@IMPLS
def test_targets_outside_of_the_whole_vocabulary_are_refused_on_every_rank(pool, impl) -> None:
    names = [name for name in OPERATIONS if "kl" not in name]
    made = [
        Problem(name, (4, 5, 0), {"impl": impl}, spoils=("none_ignored", "out_of_vocabulary"))
        for name in names
    ]
    for said in pool.run(over.raises, made, {}, ranks=3):
        for name, one in zip(names, said, strict=True):
            assert one.startswith("ValueError: targets: expected"), (name, one)
            assert "[0, 9)" in one and one.endswith("got 9"), (name, one)


@IMPLS
def test_temperatures_that_are_not_positive_are_refused_on_every_rank(pool, impl) -> None:
    wrong = PER_TOKEN.clone()
    wrong[0, 0] = 0.0
    made = [
        Problem(name, (4, 0, 5), {"impl": impl, "temperature": temperature})
        for name in OPERATIONS
        for temperature in (0.0, -1.0, wrong)
    ]
    for said in pool.run(over.raises, made, {}, ranks=3):
        for problem, one in zip(made, said, strict=True):
            assert one.startswith("ValueError: temperature"), (problem.operation, one)


def test_groups_that_are_none_are_refused(pool) -> None:
    made = [Problem(name, (9,)) for name in OPERATIONS]
    said = pool.run(over.raises_for_wrong_groups, made, ranks=1)[0]
    assert len(said) == 3 * len(made)
    for i, one in enumerate(said):
        kind = "ValueError" if i % 3 == 2 else "TypeError"
        assert one.startswith(f"{kind}: group: expected"), one


def test_second_derivatives_are_refused(pool) -> None:
    made = [Problem(name, (4, 5)) for name in OPERATIONS]
    # A loss of the statistics is differentiated by autograd, down to these.
    for said in pool.run(over.second_derivative_errors, made, ranks=2):
        for problem, one in zip(made, said, strict=True):
            assert one.startswith("RuntimeError: "), (problem.operation, one)
            assert "differentiate" in one, (problem.operation, one)


def test_transforms_are_refused(pool) -> None:
    made = [Problem(name, (4, 5)) for name in OPERATIONS]
    for said in pool.run(over.transform_errors, made, ranks=2):
        for problem, one in zip(made, said, strict=True):
            assert one.startswith("RuntimeError: "), (problem.operation, one)
            assert "torch.func" in one, (problem.operation, one)


def test_a_step_can_be_compiled(pool) -> None:
    for operation in ("token_stats", "linear_token_stats", "linear_cross_entropy"):
        problem = Problem(operation, (9, 5), {"impl": "eager"})
        whole = outcome(None, problem)
        assert_same(pool.run(over.compiled_step, problem, ranks=2), whole, problem)


def test_a_rank_that_fails_leaves_nobody_waiting(pool) -> None:
    problem = Problem("linear_token_stats", (4, 5, 3, 2))
    found = pool.outcomes(over.with_a_rank_that_fails, problem, 2.0, ranks=4)
    for rank, (value, error) in enumerate(found):
        assert value is None and error is not None
        assert ("this rank has no data" in error) == (rank == 1)
        assert "RuntimeError" in error or rank == 1
    check(pool, problem)


# DTensors.


def check_dtensors(pool: RankPool, problem: Problem, ranks: int, mesh: str = "") -> None:
    whole = outcome(None, problem)
    for found, wrong in pool.run(dtensors.as_outcome, problem, mesh, ranks=ranks):
        assert wrong == []
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            assert relative_error(found[name], expected) < TIGHT, name


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtensors_need_no_group(pool, operation, ranks) -> None:
    entropy = {"entropy": True} if "stats" in operation else {}
    problem = Problem(operation, (12,), {"impl": "eager", **entropy}, bias=True)
    check_dtensors(pool, problem, ranks)


@pytest.mark.parametrize("vocab", [13, 3, 5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtensors_that_do_not_divide(pool, operation, vocab) -> None:
    # Of 4 ranks, three have 4, the last one 1; three have 1, the last none; two have 2, then 1, 0.
    problem = Problem(operation, (vocab,), {"impl": "eager"}, bias=True)
    check_dtensors(pool, problem, 4)


@pytest.mark.parametrize("operation", ["token_stats", "linear_token_stats", "linear_kl_divergence"])
def test_dtensors_run_the_kernels(pool, operation) -> None:
    check_dtensors(pool, Problem(operation, (13,), {"impl": "triton"}), 3)


@pytest.mark.parametrize("mesh", ["copies first", "copies last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_dimension_of_the_mesh_may_have_copies(pool, operation, mesh) -> None:
    check_dtensors(pool, Problem(operation, (9,), {"impl": "eager"}, bias=True), 4, mesh)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_placements_that_are_not_served_are_named(pool, operation) -> None:
    for said in pool.run(dtensors.refusals, operation, {}, ranks=2):
        for kind, error in said.items():
            name = "group" if kind == "group beside" else kind.split(":")[0]
            assert error.startswith(f"ValueError: {name}: expected"), (kind, error)
            if kind != "group beside" and "plain" not in kind:
                placements = ("Shard", "Partial", "Replicate")
                got = error.split(" got ")[-1]
                assert any(x in got for x in placements), (kind, error)


def test_placements_on_a_grid_that_are_not_served_are_named(pool) -> None:
    for said in pool.run(dtensors.refusals_of_a_grid, ranks=4):
        for kind, error in said.items():
            assert error.startswith(f"ValueError: {kind.split(':')[0]}: expected"), (kind, error)
            assert "Shard" in error, (kind, error)


def test_a_bias_of_another_mesh_is_refused(pool) -> None:
    for error in pool.run(dtensors.of_another_mesh, ranks=2):
        assert error.startswith("ValueError: bias: expected a DTensor cut as the weight is"), error


def test_a_group_of_one_process_is_no_group_and_warns_of_nothing(tmp_path) -> None:
    """Here, where every warning is an error."""
    weight, hidden, targets = torch.randn(11, 4), torch.randn(5, 4), torch.arange(5)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        found = [
            _with_gradient(hidden, weight, targets, group)
            for group in (None, torch.distributed.group.WORLD)
        ]
    finally:
        torch.distributed.destroy_process_group()
    for whole, shared in zip(*found, strict=True):
        assert torch.equal(whole, shared)


def _with_gradient(hidden, weight, targets, group) -> list[torch.Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    loss = fastrlhf.linear_cross_entropy(hidden, weight, targets, group=group)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]
