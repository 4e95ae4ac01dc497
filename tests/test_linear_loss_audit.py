"""Losses of one's own from hidden states: values, gradients and cost, against fp64 log-softmax."""

import pytest
import torch
from support.compare import relative_error
from support.flops import FlopAudit
from torch.utils.checkpoint import checkpoint

from fastrlhf import ChunkStats, linear_loss

BATCH, STEPS, WIDTH, VOCAB = 4, 7, 5, 37
NAMES = ("hidden", "weight", "bias")
# Arbitrary ids, and how many of the 28 tokens have each: they are interleaved in memory.
SIZES = {-(2**62): 6, -3: 1, 0: 9, 5: 4, 2**62: 8}
CHUNKS = pytest.mark.parametrize("chunk_size", [1, 3, 7, 10, 1000])
GROUPED = pytest.mark.parametrize("grouped", [False, True])


class Problem:
    """Inputs in fp64, a quarter of the tokens ignored and full of garbage."""

    def __init__(self, wanted=NAMES, grouped=True, dtype=torch.float64, options=None):
        shape = (BATCH, STEPS)
        ids = torch.cat([torch.full((n,), i) for i, n in SIZES.items()])
        self.groups = ids[torch.randperm(BATCH * STEPS)].view(shape) if grouped else None
        self.targets = torch.randint(VOCAB, shape)
        self.targets.view(-1)[torch.randperm(BATCH * STEPS)[:7]] = -100
        self.live = self.targets != -100
        hidden = torch.randn(*shape, WIDTH, dtype=torch.float64).to(dtype)
        hidden[~self.live] = torch.nan
        head = (hidden, *(torch.randn(VOCAB, *n, dtype=torch.float64) for n in ((WIDTH,), ())))
        self.leaves = {n: x.to(dtype) for n, x in zip(NAMES, head, strict=True)}
        for name in wanted:
            self.leaves[name].requires_grad_()
        # Side inputs: a float one with a gradient, and an integer one, the tokens' places.
        self.advantage = torch.randn(shape, dtype=torch.float64)
        self.advantage[~self.live] = torch.nan
        self.advantage.requires_grad_()
        self.place = torch.arange(BATCH * STEPS).view(shape)
        self.slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.options = options or {}
        self.calls: list[ChunkStats] = []

    @property
    def differentiable(self) -> list[torch.Tensor]:
        found = [*self.leaves.values(), self.advantage, self.slope]
        return [x for x in found if x.requires_grad]

    def loss_fn(self, stats: ChunkStats, advantage, place):
        """Couple the tokens of a group, and use all there is to use."""
        self.calls.append(stats)
        assert stats.logprob.ndim == 1 and stats.logprob.shape == stats.lse.shape == place.shape
        assert self.live.view(-1)[place].all(), "an ignored token reached the loss"
        if self.groups is None:
            assert stats.groups is None
            unit = torch.arange(len(place))
        else:
            assert torch.equal(self.groups.view(-1)[place], stats.groups)
            for i in stats.groups.unique():
                tokens = ((self.groups == i) & self.live).view(-1).nonzero()[:, 0]
                assert torch.equal(place[stats.groups == i], tokens), "not the whole group in order"
            unit = stats.groups.unique(return_inverse=True)[1]
        per_token = self.slope * stats.logprob * advantage
        if stats.entropy is not None:
            per_token = per_token + 0.3 * stats.entropy * stats.logprob.sigmoid()
        of_group = per_token.new_zeros(int(unit.max()) + 1).index_add(0, unit, per_token)
        aux = {
            "place": place, "groups": of_group, "tokens": torch.tensor(len(place)),
            "lse": stats.lse.sum(),
        }  # fmt: skip
        return of_group.square().sum() + of_group.tanh().sum(), aux

    def fused(self, loss_fn=None, **options):
        return linear_loss(
            loss_fn or self.loss_fn, self.leaves["hidden"], self.leaves["weight"], self.targets,
            self.advantage, self.place, bias=self.leaves["bias"], groups=self.groups,
            **(self.options | options),
        )  # fmt: skip

    def eager(self, loss_fn=None, entropy=False, softcap=None, scale=1.0, temperature=1.0):
        """The same in one chunk, from fp64 logits, the tokens in the documented order."""
        order = self.live.view(-1).nonzero()[:, 0]
        if self.groups is not None:
            order = torch.tensor(sorted(order.tolist(), key=lambda i: self.groups.view(-1)[i]))
        head = {name: x.double() for name, x in self.leaves.items()}
        z = scale * (head["hidden"].view(-1, WIDTH)[order] @ head["weight"].T + head["bias"])
        z = z if softcap is None else softcap * (z / softcap).tanh()
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.view(-1)[order, None]
        log_p = (z / temperature).log_softmax(-1)
        logprob = log_p.gather(-1, self.targets.view(-1)[order, None])[:, 0]
        h = -(log_p.exp() * log_p).sum(-1) if entropy else None
        lse = (z / temperature).logsumexp(-1).detach()
        groups = None if self.groups is None else self.groups.view(-1)[order]
        side = self.advantage.view(-1)[order], self.place.view(-1)[order]
        return (loss_fn or self.loss_fn)(ChunkStats(logprob, h, lse, groups), *side)


def gradients(loss, leaves, upstream=1.0):
    return torch.autograd.grad(loss, leaves, torch.tensor(upstream, dtype=loss.dtype))


@pytest.mark.parametrize(
    "wanted", [(), *((n,) for n in NAMES), NAMES[:2], NAMES[1:], NAMES], ids="-".join
)
@CHUNKS
@GROUPED
@pytest.mark.parametrize("entropy", [False, True])
def test_values_gradients_and_aux_match_one_chunk_of_fp64(
    wanted, chunk_size, grouped, entropy
) -> None:
    problem = Problem(wanted, grouped)
    loss, aux = problem.fused(entropy=entropy, chunk_size=chunk_size)
    calls, leaves = len(problem.calls), problem.differentiable
    found = gradients(loss, leaves, -2.5)
    assert len(problem.calls) == calls, "backward called the loss"
    expected, expected_aux = problem.eager(entropy=entropy)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    for a, b, leaf in zip(found, gradients(expected, leaves, -2.5), leaves, strict=True):
        assert a.dtype == leaf.dtype and relative_error(a, b.nan_to_num()) <= 1e-11
    if "hidden" in wanted:
        assert not found[0][~problem.live].any()
    assert list(aux) == list(expected_aux)
    for name, value in aux.items():
        assert not value.requires_grad
        want = expected_aux[name].detach()
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [3, 1000])
@GROUPED
def test_kernels_match_one_chunk_of_fp64(chunk_size, grouped) -> None:
    problem = Problem(grouped=grouped)
    loss, _ = problem.fused(entropy=True, chunk_size=chunk_size, impl="triton")
    expected, _ = problem.eager(entropy=True)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-11, atol=1e-11)
    leaves = problem.differentiable
    for a, b in zip(gradients(loss, leaves), gradients(expected, leaves), strict=True):
        assert relative_error(a, b) <= 1e-11


@CHUNKS
def test_a_transform_of_the_logits(chunk_size) -> None:
    own = torch.linspace(0.5, 2.0, BATCH * STEPS, dtype=torch.float64).view(BATCH, STEPS)
    options = {"softcap": 4.0, "scale": 1.5, "temperature": own}
    problem = Problem(options=options)
    loss, _ = problem.fused(entropy=True, chunk_size=chunk_size)
    expected, _ = problem.eager(entropy=True, **options)
    leaves = problem.differentiable
    for a, b in zip(gradients(loss, leaves), gradients(expected, leaves), strict=True):
        assert relative_error(a, b) <= 1e-11


def test_chunks_hold_whole_groups_up_to_their_size() -> None:
    for chunk_size in (1, 5, 9, 20):
        problem = Problem()
        problem.fused(chunk_size=chunk_size)
        sizes = [len(stats.logprob) for stats in problem.calls]
        assert sum(sizes) == 21
        for stats in problem.calls:
            assert len(stats.logprob) <= chunk_size or len(stats.groups.unique()) == 1
        ids = [int(i) for stats in problem.calls for i in stats.groups.unique_consecutive()]
        assert ids == sorted(set(ids)), "a group came twice or out of order"


def test_chunks_of_lone_tokens_are_never_too_large() -> None:
    problem = Problem(grouped=False)
    problem.fused(chunk_size=4)
    assert all(len(stats.logprob) <= 4 for stats in problem.calls)
    assert len(problem.calls) == 6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_group_ids_of_any_integer_dtype(dtype) -> None:
    problem = Problem()
    problem.groups = problem.groups.sign().add(1)
    expected, _ = problem.fused(chunk_size=3)
    problem.groups = problem.groups.to(dtype)
    assert torch.equal(problem.fused(chunk_size=3)[0], expected)


@GROUPED
@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_two_micro_batches_accumulate(grouped, chunk_size) -> None:
    wanted, problems = None, [Problem(grouped=grouped) for _ in range(2)]
    problems[1].leaves |= {n: problems[0].leaves[n] for n in ("weight", "bias")}
    for problem in problems:
        (0.5 * problem.fused(entropy=True, chunk_size=chunk_size)[0]).backward()
    for name in ("weight", "bias"):
        leaf = problems[0].leaves[name]
        wanted = sum(gradients(0.5 * p.eager(entropy=True)[0], [leaf])[0] for p in problems)
        assert relative_error(leaf.grad, wanted) <= 1e-11


def test_backward_may_come_twice() -> None:
    problem = Problem()
    loss, _ = problem.fused(chunk_size=3)
    runs = [
        torch.autograd.grad(loss, problem.differentiable, retain_graph=retain)
        for retain in (True, False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_the_same_bits_twice(chunk_size) -> None:
    problem = Problem(dtype=torch.float32)
    runs = []
    for _ in range(2):
        loss, _ = problem.fused(entropy=True, chunk_size=chunk_size)
        runs.append((loss, *gradients(loss, problem.differentiable)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_a_side_input_may_depend_on_the_hidden_states_and_the_weight(chunk_size) -> None:
    problem = Problem()
    hidden, weight = problem.leaves["hidden"], problem.leaves["weight"]
    problem.advantage = torch.where(problem.live[..., None], hidden, 0.0) @ weight[3]
    leaves = [*problem.leaves.values(), problem.slope]
    found = gradients(problem.fused(entropy=True, chunk_size=chunk_size)[0], leaves)
    problem.advantage = torch.where(problem.live[..., None], hidden, 0.0) @ weight[3]
    expected = gradients(problem.eager(entropy=True)[0], leaves)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 1e-11


def test_a_loss_of_the_entropy_alone_or_of_nothing() -> None:
    problem = Problem()
    leaves = list(problem.leaves.values())

    def of_entropy(stats, *_):
        return stats.entropy.square().sum()

    found = gradients(problem.fused(of_entropy, entropy=True, chunk_size=3)[0], leaves)
    expected = gradients(problem.eager(of_entropy, entropy=True)[0], leaves)
    assert all(relative_error(a, b) <= 1e-11 for a, b in zip(found, expected, strict=True))
    for constant in (lambda *_: torch.tensor(2.0), lambda s, *_: s.logprob.detach().sum()):
        loss, aux = problem.fused(constant, entropy=True)
        assert aux == {}
        assert not any(x.any() for x in gradients(loss, leaves))


@pytest.mark.parametrize("chunk_size", [1, 1000])
@GROUPED
def test_aux_entries_are_summed_or_concatenated_in_order(chunk_size, grouped) -> None:
    problem = Problem(grouped=grouped)
    _, aux = problem.fused(chunk_size=chunk_size)
    live = problem.live.view(-1).nonzero()[:, 0]
    if grouped:
        ids = problem.groups.view(-1)[live]
        live = torch.cat([live[ids == i] for i in sorted(SIZES)])
    assert torch.equal(aux["place"], live)
    assert aux["tokens"] == 21 and aux["tokens"].ndim == 0 and aux["lse"].ndim == 0


@GROUPED
@pytest.mark.parametrize("wanted", [("hidden",), NAMES], ids="-".join)
def test_all_ignored_is_zero_without_a_call(grouped, wanted) -> None:
    problem = Problem(wanted, grouped)
    problem.targets.fill_(-100)
    loss, aux = problem.fused(lambda *_: pytest.fail("called"), chunk_size=3)
    assert loss.shape == () and loss == 0 and loss.dtype == torch.float64 and aux == {}
    leaves = [x for x in problem.leaves.values() if x.requires_grad]
    for gradient, leaf in zip(gradients(loss, leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@GROUPED
def test_no_tokens_at_all(grouped) -> None:
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    weight = torch.ones(VOCAB, WIDTH, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss, aux = linear_loss(
        lambda *_: pytest.fail("called"), hidden, weight, none, groups=none if grouped else None
    )
    assert loss == 0 and aux == {}
    assert not any(x.any() for x in gradients(loss, [hidden, weight]))


@GROUPED
@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_no_grad_gives_the_value_alone(grouped, chunk_size) -> None:
    problem = Problem(grouped=grouped)
    with torch.no_grad():
        loss, _ = problem.fused(entropy=True, chunk_size=chunk_size)
    assert not loss.requires_grad
    assert not any(stats.logprob.requires_grad for stats in problem.calls)
    torch.testing.assert_close(loss, problem.eager(entropy=True)[0].detach())


@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_a_frozen_model_still_trains_what_the_loss_uses(chunk_size) -> None:
    problem = Problem(())
    leaves = [problem.advantage, problem.slope]
    found = gradients(problem.fused(entropy=True, chunk_size=chunk_size)[0], leaves)
    expected = gradients(problem.eager(entropy=True)[0], leaves)
    assert all(relative_error(a, b) <= 1e-11 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_autocast_rounds_the_operands_and_nothing_else(dtype, chunk_size) -> None:
    problem = Problem(dtype=torch.float32)
    problem.leaves["hidden"] = problem.leaves["hidden"].detach().to(dtype).requires_grad_()
    leaves = problem.differentiable
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = problem.fused(entropy=True, chunk_size=chunk_size)
    found = gradients(loss, leaves)
    rounded = Problem(dtype=torch.float32)
    for name in ("groups", "targets", "live", "advantage", "place", "slope"):
        setattr(rounded, name, getattr(problem, name))
    rounded.leaves = {
        n: (x if n == "bias" else x.bfloat16()).detach().double().requires_grad_()
        for n, x in problem.leaves.items()
    }
    expected, _ = rounded.eager(entropy=True)
    assert relative_error(loss, expected.detach()) <= 1e-5
    wanted = gradients(expected, rounded.differentiable)
    for a, b, leaf in zip(found, wanted, leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a, b) <= (4e-3 if leaf.dtype == torch.bfloat16 else 1e-5)


@GROUPED
def test_checkpointing_changes_no_gradient(grouped) -> None:
    problem = Problem(grouped=grouped)
    leaves = problem.differentiable
    expected = gradients(problem.fused(entropy=True, chunk_size=3)[0], leaves)

    def of_hidden(hidden):
        problem.leaves["hidden"] = hidden
        return problem.fused(entropy=True, chunk_size=3)[0]

    checkpoint(of_hidden, problem.leaves["hidden"], use_reentrant=False).backward()
    assert all(torch.equal(leaf.grad, b) for leaf, b in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name) -> None:
    problem = Problem()
    leaf = problem.leaves[name]
    loss, _ = problem.fused()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="twice.*once_differentiable"):
        gradient.sum().backward()


def test_small_losses_in_fp16_keep_their_gradients() -> None:
    problem = Problem(dtype=torch.float16)
    leaves = list(problem.leaves.values())

    def scaled(factor):
        def loss_fn(*chunk):
            return factor * problem.loss_fn(*chunk)[0]

        loss, _ = problem.fused(loss_fn, entropy=True, chunk_size=3)
        assert loss.dtype == torch.float32
        return gradients(loss, leaves, 1 / factor)

    plain = scaled(1.0)
    for factor in (1e-6, 1e-9):
        for a, b in zip(scaled(factor), plain, strict=True):
            assert a.dtype == torch.float16 and b.any()
            torch.testing.assert_close(a, b, rtol=2**-10, atol=2**-24)
    # A mutant: the gradient kept in fp16 until its scale is known.
    lost = (plain[0].float() * 1e-9).half().float() * 1e9
    assert relative_error(lost, plain[0].nan_to_num()) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@GROUPED
def test_low_precision_is_rounded_once(dtype, grouped) -> None:
    problem = Problem(dtype=dtype, grouped=grouped)
    leaves = list(problem.leaves.values())
    found = gradients(problem.fused(entropy=True, chunk_size=1)[0], leaves)
    expected = gradients(problem.eager(entropy=True)[0], leaves)  # fp64, rounded to the leaves
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) <= torch.finfo(dtype).eps / 2


# Cost


def audit(wanted, *, groups=None, rows=64, vocab=101, width=16, chunk_size=8, entropy=False):
    """FLOPs in units of G, and the largest tensor, half of the tokens ignored."""
    leaves = dict(zip(NAMES, (torch.randn(rows, width), torch.randn(vocab, width)), strict=False))
    for name in wanted:
        leaves[name].requires_grad_()
    targets = torch.randint(vocab, (rows,))
    targets[::2] = -100

    def loss_fn(stats):
        loss = stats.logprob.square().sum()
        return loss if stats.entropy is None else loss + stats.entropy.square().sum()

    with FlopAudit() as mode:
        loss, _ = linear_loss(
            loss_fn, leaves["hidden"], leaves["weight"], targets, groups=groups,
            chunk_size=chunk_size, entropy=entropy,
        )  # fmt: skip
        if wanted:
            torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return mode.flops / (2 * (rows // 2) * vocab * width), mode.largest


COSTS = pytest.mark.parametrize(
    ("wanted", "cost"), [(NAMES[:2], 3), (("hidden",), 2), (("weight",), 2), ((), 1)]
)


@COSTS
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("group_size", [None, 2, 8])
def test_each_plan_costs_what_it_says(wanted, cost, entropy, group_size) -> None:
    # Four live tokens to a group at most, which fit into chunks of eight.
    groups = None if group_size is None else torch.arange(64) // group_size
    flops, _ = audit(wanted, groups=groups, entropy=entropy)
    assert flops == pytest.approx(cost, rel=0.01)


@COSTS
@pytest.mark.parametrize("entropy", [False, True])
def test_tokens_of_oversized_groups_cost_one_more(wanted, cost, entropy) -> None:
    extra = 1 if wanted else 0
    flops, _ = audit(wanted, groups=torch.zeros(64, dtype=torch.long), entropy=entropy)
    assert flops == pytest.approx(cost + extra, rel=0.01)
    half = torch.where(torch.arange(64) < 32, -1, torch.arange(64) // 4)
    flops, _ = audit(wanted, groups=half, entropy=entropy)
    assert flops == pytest.approx(cost + extra / 2, rel=0.01)


@COSTS
@pytest.mark.parametrize("kind", ["lone", "small groups", "one group"])
def test_memory_depends_on_the_chunk_and_not_on_the_tokens(wanted, cost, kind) -> None:
    sizes = []
    for rows in (64, 512):
        groups = {
            "lone": None,
            "small groups": torch.arange(rows) % (rows // 8),
            "one group": torch.zeros(rows, dtype=torch.long),
        }[kind]
        sizes.append(audit(wanted, groups=groups, rows=rows, vocab=3000, width=4)[1])
    assert sizes == [8 * 3000] * 2


# Errors

RESULTS = {
    "per token": lambda s, *_: s.logprob,
    "integer": lambda s, *_: torch.tensor(1),
    "number": lambda s, *_: 1.0,
    "nothing": lambda s, *_: None,
    "aux of numbers": lambda s, *_: (s.logprob.sum(), {"x": 1.0}),
    "aux of two dimensions": lambda s, *_: (s.logprob.sum(), {"x": torch.zeros(1, 1)}),
    "aux as a list": lambda s, *_: (s.logprob.sum(), [s.lse]),
    "three": lambda s, *_: (s.logprob.sum(), {}, {}),
    "empty tuple": lambda s, *_: (),
}


@pytest.mark.parametrize("case", RESULTS)
@GROUPED
def test_a_bad_result_names_loss_fn(case, grouped) -> None:
    with pytest.raises((TypeError, ValueError), match="^loss_fn: "):
        Problem(grouped=grouped).fused(RESULTS[case], chunk_size=3)


def test_entries_that_change_between_chunks_name_loss_fn() -> None:
    for entries in ([{"a": 0}, {"b": 0}], [{"a": 0}, {}], [{}, {"a": 0}], [{"a": 0}, {"a": 1}]):
        kinds = iter(entries)

        def loss_fn(stats, *_, kinds=kinds):
            entry = next(kinds)
            return stats.logprob.sum(), {name: torch.zeros([2] * n) for name, n in entry.items()}

        with pytest.raises(ValueError, match="^loss_fn: expected the same entries"):
            Problem().fused(loss_fn, chunk_size=3)


def test_errors_of_the_loss_come_through() -> None:
    def loss_fn(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Problem().fused(loss_fn)


MISTAKES = {
    "side input of another shape": ((torch.zeros(3),), {}, ValueError, r"side_inputs\[0\]"),
    "second side input": ((torch.zeros(4), torch.zeros(4, 1)), {}, ValueError, r"side_inputs\[1\]"),
    "side input of numbers": ((1.0,), {}, TypeError, r"side_inputs\[0\]"),
    "groups of another shape": ((), {"groups": torch.zeros(3).long()}, ValueError, "groups"),
    "groups of floats": ((), {"groups": torch.zeros(4)}, TypeError, "groups"),
    "groups as a list": ((), {"groups": [0, 0, 0, 0]}, TypeError, "groups"),
    "groups of bools": ((), {"groups": torch.zeros(4).bool()}, TypeError, "groups"),
    "chunk_size": ((), {"chunk_size": 0}, ValueError, "chunk_size"),
    "bias": ((), {"bias": torch.zeros(3)}, ValueError, "bias"),
    "impl": ((), {"impl": "fast"}, ValueError, "impl"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_input_names_the_argument(case) -> None:
    side, options, error, name = MISTAKES[case]
    with pytest.raises(error, match=f"^{name}: "):
        linear_loss(
            lambda *_: pytest.fail("called"), torch.zeros(4, 2), torch.zeros(5, 2),
            torch.zeros(4, dtype=torch.long), *side, **options,
        )  # fmt: skip


@pytest.mark.parametrize("target", [-1, 5])
def test_targets_out_of_range_are_named(target) -> None:
    with pytest.raises(ValueError, match=f"^targets: .*got {target}$"):
        linear_loss(
            lambda *_: pytest.fail("called"), torch.zeros(2, 3), torch.zeros(5, 3),
            torch.tensor([-100, target]),
        )  # fmt: skip
