"""Losses whose tokens, or batches, are spread over ranks, against one process that has everything.

The ranks are processes that talk by gloo. Dims: W ranks, B sequences, T tokens, P pairs.
"""

import math
from itertools import product
from typing import Any, get_args

import pytest
import torch
from support import losses_over_ranks as over
from support import rollouts_over_ranks
from support.compare import assert_as_accurate, relative_error
from support.policy_formulas import FORMS
from torch import Tensor

import fastrlhf
from fastrlhf import global_normalizer, kto_kl
from fastrlhf.losses import rejection, rollout
from fastrlhf.losses.preference import LOSS_TYPES

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("ranks"),
]

WORLDS = pytest.mark.parametrize("ranks", [2, 3, 4])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
B, T = 4, 7
REDUCTIONS = ["token-mean", "sequence-mean", "sequence-sum", "constant"]
TIGHT = 1e-12  # fp64: what is left out or counted twice is wrong by percents

Call = tuple[str, dict[str, Any], tuple[str, ...]]


def owners(ranks: int, idle: bool = False) -> Tensor:
    """Which rank has each token (B, T): unequal shares, the first sequence on one rank alone; with
    `idle`, the last rank has nothing.
    """
    torch.manual_seed(ranks)
    owner = torch.randint(ranks - idle, (B, T))
    owner[0] = 0
    return owner


def tokens(dtype: torch.dtype = torch.float64, garbage: float = math.nan) -> dict[str, Tensor]:
    """Tokens of B sequences, the third without any that counts, and the second with one."""
    torch.manual_seed(0)
    mask = torch.rand(B, T) < 0.7
    mask[1], mask[2] = torch.arange(T) == 3, False
    logprobs = -5 * torch.rand(B, T, dtype=torch.float64)
    others = {
        name: logprobs + 0.4 * torch.randn(B, T, dtype=torch.float64) for name in ("old", "ref")
    }
    found = {
        "logprobs": logprobs, **others, "advantages": torch.randn(B, T),
        "entropy": 3 * torch.rand(B, T), "weights": torch.rand(B, T),
    }  # fmt: skip
    kept = {name: torch.where(mask, x, garbage).to(dtype) for name, x in found.items()}
    return kept | {"mask": mask}


def policy_call(function: str = "policy_loss", dtype=torch.float64, **options: Any) -> Call:
    x = tokens(dtype)
    arguments = {
        "logprobs": x["logprobs"], "old_logprobs": x["old"], "advantages": x["advantages"],
        "mask": x["mask"], "ref_logprobs": x["ref"], "entropy": x["entropy"],
        "rollout_weights": x["weights"], "kl_coef": 0.3, "entropy_coef": 0.1,
    }  # fmt: skip
    return function, arguments | options, ("logprobs", "entropy")


def policy_calls(**more: Any) -> list[Call]:
    """Each surrogate with each ratio and reduction; advantages of tokens and of sequences."""
    calls = []
    for i, ((surrogate, level), reduction) in enumerate(product(FORMS, REDUCTIONS)):
        options = {"surrogate": surrogate, "ratio_level": level, "reduction": reduction, **more}
        if i % 4 == 0:
            options |= {"kl_bias_correction": True, "off_policy_mask_threshold": 0.0}
        if reduction == "constant" or i % 3 == 0:
            options["normalizer"] = 7.0
        if i % 2:
            options["advantages"] = torch.tensor([1.0, -0.5, 0.0, 2.0])
            options["rollout_weights"] = torch.tensor([[1.0], [0.5], [0.0], [2.0]])
        calls.append(policy_call(**options))
    return calls


def other_calls(dtype: torch.dtype = torch.float64) -> list[Call]:
    """Value losses, log-probs of sequences, recipes."""
    x = tokens(dtype)
    values = {
        "values": x["logprobs"], "old_values": x["old"], "returns": x["ref"], "mask": x["mask"],
    }  # fmt: skip
    scored = {"token_logprobs": x["logprobs"], "mask": x["mask"]}
    steps = {"scores": x["logprobs"], "labels": x["weights"], "mask": x["mask"]}
    return [
        ("process_reward_loss", steps, ("scores",)),
        ("process_reward_loss", steps | {"reduction": "sequence-mean"}, ("scores",)),
        ("value_loss", values, ("values",)),
        ("value_loss", values | {"normalizer": torch.tensor(5), "clip_range": None}, ("values",)),
        ("sequence_logprobs", scored, ("token_logprobs",)),
        ("sequence_logprobs", scored | {"average": True}, ("token_logprobs",)),
        policy_call("ppo_loss", dtype, dual_clip=2.0),
        policy_call("grpo_loss", dtype, loss_type="gspo"),
        policy_call("grpo_loss", dtype, loss_type="grpo", old_logprobs=None),
    ]


def preference_calls(dtype: torch.dtype = torch.float64) -> list[Call]:
    """Each loss type, with a reference of tokens or of sequences."""
    x = tokens(dtype)
    sums = torch.where(x["mask"], x["ref"], 0.0).sum(-1)
    calls = []
    for i, loss_type in enumerate(LOSS_TYPES):
        arguments = {
            "pi_logps": x["logprobs"], "ref_logps": x["ref"] if i % 2 else sums,
            "yw_idxs": torch.tensor([0, 3, 1]), "yl_idxs": torch.tensor([1, 2, 3]), "beta": 0.3,
            "mask": x["mask"], "loss_type": loss_type,
            "label_smoothing": 0.1 if loss_type in ("sigmoid", "robust", "exo_pair") else 0.0,
        }  # fmt: skip
        calls.append(("dpo_loss", arguments, ("pi_logps", "ref_logps") if i % 2 else ("pi_logps",)))
    return calls


PREFERENCE_OPTIONS: list[dict[str, Any]] = [
    {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    {"rpo_alpha": 0.7, "dpop_lambda": 2.0},
    {"average": True, "f_divergence": "js"},
    {"reference_free": True, "loss_type": "sigmoid_norm"},
    {"use_weighting": True},
]


def preference_option_calls(dtype: torch.dtype = torch.float64) -> list[Call]:
    """The options of dpo_loss that a group goes with."""
    x = tokens(dtype)
    shared = {
        "pi_logps": x["logprobs"], "ref_logps": x["ref"], "mask": x["mask"], "beta": 0.3,
        "yw_idxs": torch.tensor([0, 3, 1]), "yl_idxs": torch.tensor([1, 2, 3]),
    }  # fmt: skip
    weighed = {"log_sum_sq_probs": x["old"]}
    return [
        ("dpo_loss", shared | o | (weighed if "use_weighting" in o else {}), ("pi_logps",))
        for o in PREFERENCE_OPTIONS
    ]


def put_together(found: list[over.Found], owner: Tensor, packed: bool) -> over.Found:
    """What the ranks found, as one: values are the same bits on each, gradients have parts."""
    for one in found[1:]:
        for value, first in zip(one.values, found[0].values, strict=True):
            assert torch.equal(value, first), "another value on another rank"
    gradients = {
        name: over.put_back([one.gradients[name] for one in found], owner, packed)
        for name in found[0].gradients
    }
    return over.Found(found[0].values, gradients)


def assert_same(found: over.Found, whole: over.Found, of: Any) -> None:
    for value, expected in zip(found.values, whole.values, strict=True):
        torch.testing.assert_close(value, expected, rtol=TIGHT, atol=1e-14, msg=f"{of}: {value}")
    for name, gradient in found.gradients.items():
        assert relative_error(gradient, whole.gradients[name]) < TIGHT, (of, name)


# Tokens of each sequence on several ranks.


@pytest.mark.parametrize(
    "ranks, packed, idle",
    [
        (1, False, False), (2, False, False), (2, True, True), (3, True, False), (3, False, True),
        (4, False, False), (4, True, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "calls", [policy_calls, other_calls, preference_calls, preference_option_calls]
)
def test_tokens_over_ranks_have_loss_metrics_and_gradient_of_the_whole(
    pool, calls, ranks, packed, idle
) -> None:
    made, owner = calls(), owners(ranks, idle)
    of_ranks = pool.run(over.evaluate_parts, made, owner, packed, ranks=ranks)
    for call, found in zip(made, zip(*of_ranks, strict=True), strict=True):
        together = put_together(list(found), owner, packed)
        assert_same(together, over.evaluate(*call), call[0])


def test_the_baseline_of_kto_is_that_of_the_whole_batch(pool) -> None:
    pi, ref = -60 * torch.rand(2, 5, dtype=torch.float64)
    for low, high in ((pi, ref), (ref, pi)):
        found = pool.run(over.kl_of_part, low, high, [0, 2, 2, 5], ranks=3)
        assert all(torch.equal(found[0], other) for other in found[1:])
        torch.testing.assert_close(found[0], kto_kl(low, high))


@PACKED
def test_in_single_precision_they_are_as_accurate_as_one_process(pool, packed) -> None:
    made = [
        policy_call(dtype=torch.float32, ratio_level="sequence", reduction="sequence-mean"),
        *other_calls(torch.float32),
        *preference_calls(torch.float32),
    ]
    owner = owners(3)
    of_ranks = pool.run(over.evaluate_parts, made, owner, packed, ranks=3)
    for (function, arguments, wanted), found in zip(made, zip(*of_ranks, strict=True), strict=True):
        together = put_together(list(found), owner, packed)
        wide = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
        plain = over.evaluate(function, arguments, wanted)
        exact = over.evaluate(function, wide, wanted)
        # Of terms as large as those of a sum over tokens, and gradients of the largest.
        for values in zip(together.values, plain.values, exact.values, strict=True):
            assert values[0].dtype == torch.float32
            assert_as_accurate(*values, size=max(10.0, float(values[2].abs().max())), of=function)
        for name in wanted:
            gradients = (x.gradients[name] for x in (together, plain, exact))
            assert_as_accurate(*gradients, of=f"{function}, d_{name}")


def test_they_have_the_same_bits_each_time_and_with_any_garbage(pool) -> None:
    owner, made = owners(4), [*other_calls(), *preference_calls(), policy_call()]
    runs = [pool.run(over.evaluate_parts, made, owner, False, ranks=4) for _ in range(2)]
    dirty = [
        (function, {
            name: x.nan_to_num(nan=math.inf) if isinstance(x, Tensor) and x.shape == (B, T) else x
            for name, x in arguments.items()
        }, wanted)
        for function, arguments, wanted in made
    ]  # fmt: skip
    runs.append(pool.run(over.evaluate_parts, dirty, owner, False, ranks=4))
    for other in runs[1:]:
        for found, expected in zip(other, runs[0], strict=True):
            for one, first in zip(found, expected, strict=True):
                assert all(map(torch.equal, one.values, first.values))
                for name, gradient in first.gradients.items():
                    assert torch.equal(one.gradients[name], gradient)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_second_derivatives_are_those_of_the_whole(pool, level) -> None:
    _, arguments, _ = policy_call(ratio_level=level, surrogate="sapo", reduction="sequence-mean")
    owner = owners(3)
    found = pool.run(over.gradient_of_gradient, "policy_loss", arguments, owner, ranks=3)
    expected = over.gradient_of_gradient(None, "policy_loss", arguments, owner)
    assert relative_error(over.put_back(found, owner, False), expected) < TIGHT


def test_what_does_not_fit_is_named(pool) -> None:
    x, sums = tokens(), torch.zeros(B, dtype=torch.float64)
    pairs = {"yw_idxs": torch.tensor([0]), "yl_idxs": torch.tensor([1])}
    flat = {"token_logprobs": torch.zeros(3), "cu_seqlens": torch.tensor([0, 1, 3])}
    said = pool.run(
        over.messages,
        [
            ("dpo_loss", {"pi_logps": sums, "ref_logps": sums, **pairs}),
            ("sequence_logprobs", flat),
        ],
        ranks=1,
    )[0]
    assert len(said) == 2
    assert said[0].startswith("ValueError: group: expected None for log-probs of sequences")
    assert said[1].startswith("ValueError: token_logprobs: expected packed tokens (1, N)")
    made = [policy_call()[:2], *((name, arguments) for name, arguments, _ in other_calls())]
    made += [
        preference_calls()[0][:2], ("whiten", {"x": x["logprobs"], "mask": x["mask"]}),
        ("group_advantages", {"rewards": sums, "groups": torch.zeros(B, dtype=torch.long)}),
        ("global_normalizer", {"mask": x["mask"]}),
    ]  # fmt: skip
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
    for wrong, error in (("world", TypeError), (4, TypeError), (outside, ValueError)):
        for function, arguments in made:
            with pytest.raises(error, match=r"^group: "):
                getattr(fastrlhf, function)(**arguments, group=wrong)


# Batches over ranks: counts.


def masks_of(ranks: int) -> list[list[Tensor]]:
    """Of each rank as many micro-batches as its number and one more, of unequal sizes; the last
    has one without entries.
    """
    torch.manual_seed(2)
    found = [
        [torch.rand(2 + i, 5 + rank) < 0.5 for i in range(rank + 1)] for rank in range(ranks - 1)
    ]
    return [*found, [torch.zeros(0, 5)]]


@WORLDS
def test_the_normalizer_counts_micro_batches_and_ranks(pool, ranks) -> None:
    parts = masks_of(ranks)
    count = sum(int(x.sum()) for masks in parts for x in masks)
    for rank, found in enumerate(pool.run(over.counts_of_part, parts, ranks=ranks)):
        of_mean, of_all, of_first, own = found
        assert of_mean.dtype == torch.float64 and of_mean == count / ranks
        assert of_all.dtype == torch.int64 and of_all == count
        assert of_first == sum(int(masks[0].sum()) for masks in parts)
        assert own == max(int(parts[rank][0].sum()), 1)


def test_without_a_group_it_counts_what_is_here() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    for given, count in ((mask, 3), ([mask, mask[:1]], 5), (mask.bool()[0], 2), (mask[:0], 1)):
        for gradients in ("sum", "mean"):
            found = global_normalizer(given, gradients=gradients)
            assert found == count and found.shape == ()
    for wrong, error in (
        ([], ValueError),
        (mask * 2, ValueError),
        (3, TypeError),
        ("ab", TypeError),
    ):
        with pytest.raises(error, match=r"^mask: "):
            global_normalizer(wrong)
    with pytest.raises(ValueError, match=r"^gradients: expected one of sum, mean, got 'average'"):
        global_normalizer(mask, gradients="average")


def batch_of_sequences(sequences: int, longest: int) -> dict[str, Tensor]:
    """Sequences of unequal lengths, each with a token that counts at least."""
    mask = (torch.arange(longest) < torch.randint(2, longest + 1, (sequences, 1))).bool()
    return {
        "ids": torch.randint(20, (sequences, longest)),
        "targets": torch.randint(9, (sequences, longest)),
        "old_logprobs": -3 * torch.rand(sequences, longest, dtype=torch.float64),
        "advantages": torch.randn(sequences, dtype=torch.float64),
        "mask": mask,
    }


def as_one_batch(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(batch["ids"].shape[1] for batch in batches)

    def padded(x: Tensor) -> Tensor:
        more = longest - x.shape[1] if x.ndim == 2 else 0
        return torch.nn.functional.pad(x, (0, more)) if more else x

    return {name: torch.cat([padded(batch[name]) for batch in batches]) for name in batches[0]}


@WORLDS
@pytest.mark.parametrize("step", over.STEPS)
def test_accumulation_times_data_parallelism_is_one_large_batch(pool, step, ranks) -> None:
    """The example: each rank has micro-batches of its own, of unequal sizes and lengths and of
    another number, and DDP takes the mean of the gradients.
    """
    if step.startswith("SFT"):
        pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(3)
    of_ranks = [
        [batch_of_sequences(2 * (1 + i), longest=4 + rank) for i in range(1 + rank % 2)]
        for rank in range(ranks)
    ]
    whole = as_one_batch([batch for batches in of_ranks for batch in batches])
    constant = len(whole["ids"]) if step.endswith("constant") else None  # which has no default
    loss, gradient = over.whole_step(step, whole, constant)
    for own_loss, own_gradient in pool.run(over.accumulated_step, step, of_ranks, ranks=ranks):
        torch.testing.assert_close(own_loss, loss, rtol=TIGHT, atol=1e-14)
        assert relative_error(own_gradient, gradient) < TIGHT


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "sequence-sum"])
def test_sequences_on_some_ranks_and_their_tokens_on_others_are_one_large_batch(
    pool, reduction
) -> None:
    torch.manual_seed(6)
    halves = [batch_of_sequences(B, T) for _ in range(2)]
    loss, gradient = over.whole_step(f"policy, {reduction}", as_one_batch(halves), None)
    for own in pool.run(over.step_of_a_grid, halves, owners(2), reduction, ranks=4):
        torch.testing.assert_close(own[0], loss, rtol=TIGHT, atol=1e-14)
        assert relative_error(own[1], gradient) < TIGHT


# Batches over ranks: statistics.


@WORLDS
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whitened_is_the_batch_of_all_ranks(pool, dtype, shift, ranks) -> None:
    torch.manual_seed(4)
    sizes = [5, 9, 0, 4][:ranks]
    parts = [
        (3 + torch.randn(n, 3), torch.rand(n, 3) < 0.7, torch.randn(n, 3)) for n in sizes
    ]  # fmt: skip
    parts = [(torch.where(m, x, math.nan).to(dtype), m, w.to(dtype)) for x, m, w in parts]
    found = pool.run(over.whiten_part, parts, shift, ranks=ranks)
    together = torch.cat([one.values[0] for one in found])
    gradient = torch.cat([one.gradients["x"] for one in found])
    x, mask, weights = (torch.cat(some) for some in zip(*parts, strict=True))

    def of_one_process(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        whole = fastrlhf.whiten(x, mask, shift_mean=shift)
        return whole.detach(), torch.autograd.grad(whole, x, weights.to(x.dtype))[0]

    plain, exact = of_one_process(x.clone()), of_one_process(x.double())
    if dtype == torch.float64:
        assert relative_error(together, exact[0]) < TIGHT
        assert relative_error(gradient, exact[1]) < TIGHT
    else:
        assert_as_accurate(together, plain[0], exact[0])
        assert_as_accurate(gradient, plain[1], exact[1])


@WORLDS
@pytest.mark.parametrize("kind", ["real", "bool"])
def test_advantages_of_a_group_that_is_on_several_ranks_are_those_of_one_process(
    pool, kind, ranks
) -> None:
    torch.manual_seed(5)
    sizes = [7, 3, 0, 4][:ranks]
    parts = [
        {
            "rewards": torch.randn(n) if kind == "real" else torch.rand(n) < 0.5,
            "groups": torch.randint(3, (n,), dtype=torch.int32), "valid": torch.rand(n) < 0.8,
        }
        for n in sizes
    ]  # fmt: skip
    kinds = ("grpo", "dr_grpo", "rloo", "reinforce++")
    found = pool.run(over.advantages_of_part, parts, kinds, ranks=ranks)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for kind, own in zip(kinds, zip(*found, strict=True), strict=True):
        assert [len(x) for x in own] == sizes
        assert torch.equal(torch.cat(own), fastrlhf.group_advantages(**whole, kind=kind))


@WORLDS
def test_comparisons_over_several_ranks_have_the_bits_of_one_process(pool, ranks) -> None:
    torch.manual_seed(6)
    sizes = [7, 3, 0, 4][:ranks]
    parts = [
        {
            "rewards": torch.randn(n), "groups": torch.randint(3, (n,)),
            "valid": torch.rand(n) < 0.8, "lengths": torch.randint(9, (n,)),
        }
        for n in sizes
    ]  # fmt: skip
    found = pool.run(over.comparisons_of_part, parts, ranks=ranks)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected = over.comparisons_of_part(None, [whole])
    for own, of_whole in zip(zip(*found, strict=True), expected, strict=True):
        assert [len(x) for x in own] == sizes
        assert torch.equal(torch.cat(own), of_whole) and of_whole.any()


@WORLDS
def test_a_trust_region_step_of_ranks_with_unequal_parts_is_that_of_the_whole(pool, ranks) -> None:
    owner = torch.tensor([0, 0, 0, 1, 0, 2, 0, 2, 0, 0, 0, 0])[:12].clamp(max=ranks - 1)
    owner[3] = 0 if ranks == 3 else owner[3]  # of three ranks, the second has nothing
    expected = over.trust_region_step(None, owner)
    assert expected[0][0], "accepted"
    found = pool.run(over.trust_region_step, owner, ranks=ranks)
    for info, table, fisher in found:
        for value, of_whole in zip(info, expected[0], strict=True):
            torch.testing.assert_close(value, of_whole)
        torch.testing.assert_close(table, expected[1])
        torch.testing.assert_close(fisher, expected[2], rtol=1e-10, atol=1e-14)
        assert torch.equal(table, found[0][1])


# Corrections for what an engine samples by.


@PACKED
def test_rollout_weights_and_their_metrics_are_those_of_the_whole(pool, packed) -> None:
    x, owner = tokens(), owners(3, idle=True)
    arguments = {"logprobs": x["logprobs"], "rollout_logprobs": x["old"], "mask": x["mask"]}
    options = {"clip_max": 1.2, "clip_min": 0.8, "batch_normalize": True}
    modes = get_args(rollout.RolloutMode)
    levels = get_args(rejection.RejectionLevel)
    calls = [("rollout_correction", {"mode": mode, **options}) for mode in modes]
    calls += [
        ("rollout_rejection", {"level": level, "estimator": "k3", "upper": 0.08})
        for level in levels
    ]
    found = pool.run(
        rollouts_over_ranks.corrections_of_part, arguments, calls, owner, packed, ranks=3
    )
    for i, (function, of_call) in enumerate(calls):
        whole, metrics = getattr(fastrlhf, function)(**arguments, **of_call)
        parts, of_ranks = zip(*(values[i] for values in found), strict=True)
        together = over.put_back([part.double() for part in parts], owner, packed)
        torch.testing.assert_close(together, whole.double(), rtol=TIGHT, atol=0)
        for name, value in metrics.items():
            assert all(torch.equal(one[name], of_ranks[0][name]) for one in of_ranks), name
            torch.testing.assert_close(of_ranks[0][name], value, rtol=TIGHT, atol=1e-14, msg=name)


@WORLDS
def test_tokens_are_chosen_from_those_of_all_ranks(pool, ranks) -> None:
    torch.manual_seed(7)
    sizes = [3, 5, 0, 2][:ranks]
    parts = [
        {
            "logprobs": -torch.rand(n, 6), "advantages": torch.randn(n),
            "mask": torch.rand(n, 6) < 0.8, "entropy": torch.rand(n, 6),
        }
        for n in sizes
    ]  # fmt: skip
    parts = [
        {name: x.double() if x.is_floating_point() else x for name, x in part.items()}
        for part in parts
    ]
    calls = [
        ("top_entropy_mask", {"share": 0.3}),
        ("kl_cov_mask", {"share": 0.2}),
        # All candidates, for which of them is drawn at random.
        ("clip_cov_mask", {"share": 1.0, "low": 0.1}),
    ]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = pool.run(rollouts_over_ranks.selections_of_part, parts, calls, ranks=ranks)
    expected = rollouts_over_ranks.selections(None, whole, calls)
    for own, together in zip(zip(*found, strict=True), expected, strict=True):
        assert [len(x) for x in own] == sizes
        assert torch.equal(torch.cat(own), together) and 0 < together.sum() < whole["mask"].sum()
    few = [("clip_cov_mask", {"share": 0.1, "low": 0.0, "high": 9.0})]
    kept = torch.cat([own[0] for own in pool.run(
        rollouts_over_ranks.selections_of_part, parts, few, ranks=ranks
    )])  # fmt: skip
    assert (whole["mask"] & ~kept).sum() == int(0.1 * whole["mask"].sum())
