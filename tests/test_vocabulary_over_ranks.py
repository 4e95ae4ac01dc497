"""A vocabulary that ranks share, against one process that has all of it: every operation and every
cut.

The ranks are processes that talk by gloo. Dims: W ranks, B sequences, T tokens, N = B·T, n of them
with a target, H width, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import vocabulary_over_ranks as over
from support.kept import random_support
from support.vocabulary_checks import (
    BACKENDS,
    CUTS,
    EVERYTHING,
    IMPLS,
    KL,
    LINEAR,
    LINEAR_BACKENDS,
    PER_SEQUENCE,
    PER_TOKEN,
    B,
    T,
    assert_same,
    check,
    joined,
    name_of,
    of_ranks,
    own_targets,
)
from support.vocabulary_over_ranks import (
    OF_LOGITS,
    OPERATIONS,
    Problem,
    error_of_another_support,
    outcome,
)

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("vocabulary"),
]

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


def test_a_step_can_be_compiled(pool) -> None:
    for operation in ("token_stats", "linear_token_stats", "linear_cross_entropy"):
        problem = Problem(operation, (9, 5), {"impl": "eager"})
        whole = outcome(None, problem)
        assert_same(pool.run(over.compiled_step, problem, ranks=2), whole, problem)
