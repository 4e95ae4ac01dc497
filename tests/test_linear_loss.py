"""Losses of one's own from hidden states against the same loss of whole logits in fp64."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate, relative_error
from support.matmuls import MatmulAudit
from torch import Tensor, autograd
from torch.utils.checkpoint import checkpoint

import fastrlhf
from fastrlhf import ChunkStats, linear_loss
from fastrlhf.hf.logit_map import LogitMap
from fastrlhf.hf.own_module import ModuleScorer
from fastrlhf.ops import linear_plans
from fastrlhf.ops.scorer import LinearScorer

SEQUENCES, TOKENS, WIDTH, VOCAB = 5, 7, 6, 37
# In memory, groups lie in stripes; ids are anything.
GROUPS = torch.tensor([7, -3, 2**40, 7, -3])[:, None].expand(SEQUENCES, TOKENS)
NEEDS = {
    "hidden and weight": (True, True, True),
    "hidden": (True, False, False),
    "weight": (False, True, False),
    "nothing": (False, False, False),
}


def inputs(needs=(True, True, True), dtype=torch.float64):
    """Hidden states with garbage in ignored rows, weight, bias; targets; advantages."""
    targets = torch.randint(VOCAB, (SEQUENCES, TOKENS))
    targets[:, :3] = -100
    hidden = torch.randn(SEQUENCES, TOKENS, WIDTH, dtype=dtype)
    hidden[:, 1] = torch.nan
    tensors = [hidden, torch.randn(VOCAB, WIDTH, dtype=dtype), torch.randn(VOCAB, dtype=dtype)]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    return tensors, targets, torch.randn(SEQUENCES, TOKENS, dtype=dtype, requires_grad=True)


class GroupLoss:
    """A loss that a part of a group cannot have, and a parameter of its own."""

    def __init__(self, dtype=torch.float64):
        self.scale = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        self.seen: list[Tensor] = []

    def __call__(self, stats: ChunkStats, advantages: Tensor, position: Tensor):
        self.seen.append(position)
        losses = []
        for group in stats.groups.unique():
            of = stats.groups == group
            gain = torch.tanh(self.scale * (stats.logprob * advantages)[of].sum())
            losses.append(gain + 0.01 * stats.entropy[of].sum().square())
        entries = {"loss": torch.stack(losses), "groups": torch.tensor(len(losses)),
                   "position": position}  # fmt: skip
        return torch.stack(losses).sum(), entries


POSITIONS = torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS)


def linear(loss_fn, tensors, targets, *side, **options):
    return linear_loss(
        loss_fn, tensors[0], tensors[1], targets, *side, bias=tensors[2], entropy=True, **options
    )


def whole(loss_fn, tensors, targets, *side, groups=None, temperature=1.0, softcap=None, scale=1.0):
    """The documented eager equivalent."""
    hidden, weight, bias = tensors
    live = targets != -100
    z = (hidden[live] @ weight.T + bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    own = isinstance(temperature, Tensor)
    z = z / (temperature[live][:, None].to(z.dtype) if own else temperature)
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(-1, targets[live][:, None])[:, 0]
    entropy = -(log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)).sum(-1)
    ids = None if groups is None else groups[live]
    return loss_fn(ChunkStats(logprob, entropy, z.logsumexp(-1), ids), *(x[live] for x in side))


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("needs", NEEDS)
def test_groups_reach_the_loss_whole(needs, chunk_size) -> None:
    tensors, targets, advantages = inputs(NEEDS[needs])
    loss_fn = GroupLoss()
    side = advantages, POSITIONS
    loss, aux = linear(loss_fn, tensors, targets, *side, groups=GROUPS, chunk_size=chunk_size)
    seen = torch.cat(loss_fn.seen)
    by_group = [POSITIONS[i == GROUPS].view(-1, TOKENS)[:, 3:].flatten() for i in (-3, 7, 2**40)]
    assert seen.tolist() == aux["position"].tolist() == torch.cat(by_group).tolist()
    assert aux["groups"].item() == 3
    # Groups of 8, 8 and 4 tokens: packed, but never cut.
    calls = {1: 3, 3: 3, 8: 3, 9: 3, 100: 1}[chunk_size]
    assert len(loss_fn.seen) == calls
    expected, expected_aux = whole(loss_fn, tensors, targets, *side, groups=GROUPS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(aux["loss"], expected_aux["loss"].detach())
    wanted = [x for x in (*tensors, advantages, loss_fn.scale) if x.requires_grad]
    for a, b in zip(
        autograd.grad(-2.5 * loss, wanted, retain_graph=True),
        autograd.grad(-2.5 * expected, wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not any(value.requires_grad for value in aux.values())
    again = autograd.grad(loss, wanted)
    assert all(bool(torch.isfinite(x).all()) for x in again)


def reinforce(stats: ChunkStats, advantages: Tensor) -> Tensor:
    assert stats.groups is None
    return -(stats.logprob * advantages).sum()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_tokens_by_themselves(impl, device) -> None:
    place = device if impl == "triton" else torch.device("cpu")
    tensors, targets, advantages = inputs()
    expected = whole(reinforce, tensors, targets, advantages)
    moved = [x.detach().to(place).requires_grad_() for x in tensors]
    loss, aux = linear(
        reinforce, moved, targets.to(place), advantages.to(place), chunk_size=6, impl=impl
    )
    assert aux == {}
    torch.testing.assert_close(loss.cpu(), expected)
    for a, b in zip(autograd.grad(loss, moved), autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(a.cpu(), b)
    gradient = autograd.grad(linear(reinforce, tensors, targets, advantages)[0], tensors[0])[0]
    assert not gradient[targets == -100].any()


def z_loss(stats: ChunkStats, advantages: Tensor) -> Tensor:
    return (0.3 * stats.lse.square() - stats.logprob * advantages).sum()


def z_loss_of_groups(stats: ChunkStats, advantages: Tensor) -> Tensor:
    """What couples all tokens of a group, through each of the statistics."""
    same = (stats.groups[:, None] == stats.groups).to(stats.lse.dtype)
    size = same @ (stats.lse * advantages - 0.2 * stats.entropy)
    return (size / 8).tanh().sum() + 0.1 * (size * stats.logprob).sum()


LSE_LOSSES = {
    "lse": lambda stats, advantages: (stats.lse.square() * advantages).sum(),
    "lse and log-prob": z_loss,
    "lse and entropy": lambda stats, advantages: (stats.lse * stats.entropy * advantages).sum(),
    "groups": z_loss_of_groups,
}
LSE_NEEDS = {
    "hidden, weight and bias": (True, True, True),
    "hidden": (True, False, False),
    "weight": (False, True, False),
    "bias": (False, False, True),
}
LSE_TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": 0.4, "temperature": 0.7},
    "all": {"softcap": 5.0, "scale": 1.5, "temperature": POSITIONS.double() / 30 + 0.5},
}


def assert_right_with_the_lse(name, needs, dtype, impl, place, **options) -> None:
    """Compare a loss and its gradients with those of whole logits in fp64, by what the plain
    formula loses in the dtype of accumulation.
    """
    tensors, targets, advantages = inputs(needs, dtype)
    advantages = advantages.detach()
    groups = GROUPS if name == "groups" else None
    transform = {key: x for key, x in options.items() if key != "chunk_size"}
    results = []
    for kind in (torch.float64, torch.promote_types(dtype, torch.float32), None):
        to = [x.detach().to(kind or dtype).requires_grad_(x.requires_grad) for x in tensors]
        side = advantages.to(kind or torch.promote_types(dtype, torch.float32))
        if kind is not None:
            loss = whole(LSE_LOSSES[name], to, targets, side, groups=groups, **transform)
        else:
            to = [x.detach().to(place).requires_grad_(x.requires_grad) for x in to]
            moved = {k: x.to(place) if isinstance(x, Tensor) else x for k, x in options.items()}
            loss = linear(
                LSE_LOSSES[name], to, targets.to(place), side.to(place), impl=impl,
                groups=None if groups is None else groups.to(place), **moved,
            )[0]  # fmt: skip
        wanted = [x for x in to if x.requires_grad]
        results.append((loss, *autograd.grad(loss, wanted)))
    exact, plain, found = results
    # A sum of twenty squares of an lse, which may cancel.
    assert_as_accurate(
        found[0], plain[0], exact[0], size=max(100.0, float(exact[0].detach().abs()))
    )
    for a, b, c in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        # In tens of tokens, each with terms of that size, which cancel.
        assert_as_accurate(a, b, c, size=2 * float(c.abs().max()))
        ignored = (targets == -100).to(a.device)
        assert a.shape[0] != SEQUENCES or a.ndim < 3 or not a[ignored].any()


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("transform", LSE_TRANSFORMS)
@pytest.mark.parametrize("name", LSE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_lse_is_differentiable(impl, transform, name, dtype, device) -> None:
    place = device if impl == "triton" else torch.device("cpu")
    options = LSE_TRANSFORMS[transform] | {"chunk_size": 6}  # less than a group of 8
    needs = LSE_NEEDS["hidden, weight and bias"]
    assert_right_with_the_lse(name, needs, dtype, impl, place, **options)


@pytest.mark.parametrize("chunk_size", [3, 8, 100])
@pytest.mark.parametrize("name", LSE_LOSSES)
@pytest.mark.parametrize("needs", LSE_NEEDS)
def test_whatever_needs_it_gets_the_gradient_of_the_lse(needs, name, chunk_size) -> None:
    assert_right_with_the_lse(
        name, LSE_NEEDS[needs], torch.float64, "eager", "cpu", chunk_size=chunk_size, softcap=6.0
    )


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_the_lse_of_words_that_are_ruled_out(impl, device) -> None:
    tensors, targets, advantages = inputs()
    with torch.no_grad():
        tensors[2][5:20] = -torch.inf
    targets[targets >= 5] = 30
    targets[0, -1] = 10  # one of them
    nobody = torch.where(targets == 10, -100, targets)

    def gradients(function, targets, **options):
        place = device if options.get("impl") == "triton" else torch.device("cpu")
        moved = [x.detach().to(place).requires_grad_() for x in tensors]
        side = advantages.detach().to(place)
        loss = function(z_loss, moved, targets.to(place), side, **options)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return [x.cpu() for x in autograd.grad(loss, moved)]

    found = gradients(linear, nobody, chunk_size=6, impl=impl)
    for a, b in zip(found, gradients(whole, nobody), strict=True):
        torch.testing.assert_close(a, b)
    # A target without probability has no log-prob, but the row has an lse.
    assert all(bool(x.isfinite().all()) for x in gradients(linear, targets, impl=impl))
    with torch.no_grad():
        tensors[2][:] = -torch.inf
    assert not any(x.any() for x in gradients(linear, nobody, impl=impl))


def test_only_a_loss_that_uses_the_lse_asks_for_its_gradient(monkeypatch) -> None:
    asked = []
    d_logits = linear_plans.Workbench.d_logits

    def recorded(self, block, logits, stats, slopes, **options):
        asked.append(slopes)
        return d_logits(self, block, logits, stats, slopes, **options)

    monkeypatch.setattr(linear_plans.Workbench, "d_logits", recorded)
    tensors, targets, advantages = inputs()
    linear(reinforce, tensors, targets, advantages)
    linear(lambda stats: (-stats.logprob.sum(), {"lse": stats.lse}), tensors, targets)
    assert [slopes.lse for slopes in asked] == [None, None]
    linear(lambda stats: stats.lse.sum(), tensors, targets)
    assert asked[2].lse.all() and not asked[2].logprob.any() and asked[2].entropy is None


def test_elsewhere_the_lse_has_no_gradient() -> None:
    tensors, targets, _ = inputs()
    stats = fastrlhf.linear_token_stats(*tensors[:2], targets, bias=tensors[2])
    assert stats.logprob.requires_grad and not stats.lse.requires_grad
    with torch.no_grad():
        _, aux = linear(lambda s: (s.lse.sum(), {"lse": s.lse}), tensors, targets)
    assert torch.equal(aux["lse"], stats.lse[targets != -100])


def test_gradients_accumulate() -> None:
    tensors, targets, advantages = inputs()
    for half in (slice(0, 2), slice(2, 5)):
        parts = [tensors[0][half], *tensors[1:]]
        linear(reinforce, parts, targets[half], advantages.detach()[half])[0].div(2).backward()
    expected = whole(reinforce, tensors, targets, advantages.detach()) / 2
    for tensor, gradient in zip(tensors, autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_without_targets_or_gradients() -> None:
    tensors, targets, advantages = inputs()
    ignored = torch.full_like(targets, -100)
    for groups in (None, GROUPS):
        loss, aux = linear(None, tensors, ignored, advantages, groups=groups)
        assert loss.item() == 0 and aux == {}
        assert not any(x.any() for x in autograd.grad(loss, tensors))
    with torch.no_grad():
        assert not linear(reinforce, tensors, targets, advantages)[0].requires_grad


def test_a_loss_without_log_probs() -> None:
    tensors, targets, advantages = inputs()
    loss, _ = linear(lambda stats, a: a.sum(), tensors, targets, advantages)
    assert not any(x.any() for x in autograd.grad(loss, tensors, retain_graph=True))
    (gradient,) = autograd.grad(loss, advantages)
    assert torch.equal(gradient, (targets != -100).double())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant) -> None:
    tensors, targets, advantages = inputs()

    def loss(hidden):
        return linear(reinforce, [hidden, *tensors[1:]], targets, advantages.detach())[0]

    plain = autograd.grad(loss(tensors[0]), tensors)
    checkpoint(loss, tensors[0], use_reentrant=reentrant).backward()
    for x, gradient in zip(tensors, plain, strict=True):
        assert torch.equal(x.grad, gradient)


def test_a_second_derivative_is_refused() -> None:
    tensors, targets, advantages = inputs()
    loss = linear(reinforce, tensors, targets, advantages)[0]
    with pytest.raises(RuntimeError, match=r"^linear_loss: .*cannot be differentiated"):
        autograd.grad(loss, tensors[1], create_graph=True, retain_graph=True)
    # It would miss what goes through the log-probs.
    with pytest.raises(RuntimeError, match=r"^linear_loss: .*cannot be differentiated"):
        autograd.grad(loss, advantages, create_graph=True)


def test_autocast_and_small_fp16_losses() -> None:
    tensors, targets, advantages = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear(reinforce, tensors, targets, advantages, chunk_size=6)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in tensors[:2]]
    expected = whole(reinforce, [*rounded, tensors[2].double()], targets, advantages.double())
    fine = [x.float() for x in (*rounded, tensors[2], advantages)]
    plain = whole(reinforce, fine[:3], targets, fine[3])
    # A sum of log-probs of up to ten nats, which may cancel.
    size = 10 * float(advantages.detach()[targets != -100].abs().sum())
    assert_as_accurate(loss, plain, expected, size=size)
    for a, b in zip(
        autograd.grad(loss, tensors[:2]), autograd.grad(expected, rounded), strict=True
    ):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 5e-3

    half = [x.detach().half().requires_grad_() for x in tensors]

    def gradients(factor: float) -> tuple[Tensor, ...]:
        def small(stats, a):
            return reinforce(stats, a) * factor

        return autograd.grad(
            linear(small, half, targets, advantages)[0], half, torch.tensor(1 / factor)
        )

    for a, b in zip(gradients(1e-8), gradients(1.0), strict=True):
        assert relative_error(a, b) < 1e-3


def likelihood(stats: ChunkStats) -> Tensor:
    return -stats.logprob.sum()


def matmuls(needs: str, *, groups: bool = False, chunk_size: int = 8, loss_fn=likelihood) -> float:
    """Matmuls of forward and backward in units of G, half of the tokens ignored."""
    hidden, weight = torch.randn(4, 16, 32), torch.randn(1000, 32)
    for tensor, need in zip((hidden, weight), NEEDS[needs], strict=False):
        tensor.requires_grad_(need)
    targets = torch.randint(1000, (4, 16))
    targets[:, ::2] = -100
    ids = torch.arange(4)[:, None].expand(4, 16) if groups else None
    with MatmulAudit() as audit:
        loss, _ = linear_loss(loss_fn, hidden, weight, targets, groups=ids, chunk_size=chunk_size)
        if needs != "nothing":
            loss.backward()
    # One weight gradient, or eight rows of logits: no (n, V), let alone (N, V).
    assert audit.largest <= 1000 * 32
    return audit.operations / (2 * 32 * 1000 * 32)


@pytest.mark.parametrize("groups", [False, True])
def test_as_many_matmuls_as_the_plan_says(groups) -> None:
    assert matmuls("hidden and weight", groups=groups) == pytest.approx(3, rel=0.01)
    assert matmuls("hidden", groups=groups) == pytest.approx(2, rel=0.01)
    assert matmuls("weight", groups=groups) == pytest.approx(2, rel=0.01)
    assert matmuls("nothing", groups=groups) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("groups", [False, True])
def test_the_gradient_of_the_lse_costs_no_matmul(groups) -> None:
    def loss_fn(stats):
        return stats.lse.square().sum() - stats.logprob.sum()

    for needs, expected in (("hidden and weight", 3), ("hidden", 2), ("weight", 2), ("nothing", 1)):
        found = matmuls(needs, groups=groups, loss_fn=loss_fn)
        assert found == pytest.approx(expected, rel=0.01)


def test_a_group_larger_than_a_chunk_costs_one_more() -> None:
    assert matmuls("hidden and weight", groups=True, chunk_size=3) == pytest.approx(4, rel=0.01)
    assert matmuls("hidden", groups=True, chunk_size=3) == pytest.approx(3, rel=0.01)
    assert matmuls("nothing", groups=True, chunk_size=3) == pytest.approx(1, rel=0.01)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_compiled_callers() -> None:
    tensors, targets, advantages = inputs()
    compiled = torch.compile(
        lambda x, w, b: linear(reinforce, [1.0 * x, w, b], targets, advantages)[0],
        backend="aot_eager",
    )
    expected = autograd.grad(linear(reinforce, tensors, targets, advantages)[0], tensors)
    for a, b in zip(autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda lp: lp, "^loss_fn: expected a 0-d"),
        (lambda lp: 1.0, "^loss_fn: expected a 0-d"),
        (lambda lp: (lp.sum(), lp), "^loss_fn: expected a dict"),
        (lambda lp: (lp.sum(), {}, {}), "^loss_fn: .*got 3 values"),
        (lambda lp: (), "^loss_fn: expected a 0-d"),
        (lambda lp: (lp.sum(), {"x": 1.0}), "^loss_fn: .*'x'"),
        (lambda lp: (lp.sum(), {"x": torch.zeros(2, 2)}), "^loss_fn: .*'x'"),
        (lambda lp: (lp.sum(), {"a" if len(lp) == 4 else "b": lp}), "^loss_fn: expected the same"),
    ],
)
def test_a_bad_loss_is_named(result, message) -> None:
    tensors, targets, _ = inputs()
    targets[0, -1] = -100
    with pytest.raises(ValueError, match=message):
        linear(
            lambda stats: result(stats.logprob),
            tensors,
            targets,
            chunk_size=4,
            groups=POSITIONS // 7,
        )


def test_bad_arguments_are_named() -> None:
    tensors, targets, advantages = inputs()
    with pytest.raises(ValueError, match=r"^side_inputs\[1\]: "):
        linear(reinforce, tensors, targets, advantages, advantages[0])
    with pytest.raises(TypeError, match=r"^side_inputs\[0\]: "):
        linear(reinforce, tensors, targets, 1.0)
    with pytest.raises(TypeError, match=r"^groups: "):
        linear(reinforce, tensors, targets, groups=advantages)
    with pytest.raises(ValueError, match=r"^groups: "):
        linear(reinforce, tensors, targets, groups=GROUPS[0])


def test_the_loss_sees_what_token_stats_gives() -> None:
    tensors, targets, _ = inputs(NEEDS["nothing"])
    expected = fastrlhf.linear_token_stats(*tensors[:2], targets, bias=tensors[2], entropy=True)
    _, aux = linear(
        lambda s: (s.logprob.sum(), {"p": s.logprob, "h": s.entropy, "lse": s.lse}),
        tensors,
        targets,
    )
    live = targets != -100
    for name, value in zip(("p", "h", "lse"), expected[:3], strict=True):
        torch.testing.assert_close(aux[name], value[live])


@pytest.mark.parametrize("kind", ["linear", "module"])
def test_a_loss_may_see_further_statistics_of_a_scorer(kind) -> None:
    (hidden, weight, bias), targets, _ = inputs()
    scorer = {
        "linear": LinearScorer(hidden, [weight], bias, temperature=0.7, chunk_size=3),
        "module": ModuleScorer(
            hidden, lambda x: F.linear(x, weight, bias), LogitMap(), len(weight), 0.7, 3, "auto"
        ),
    }[kind]
    names = fastrlhf.reference.FURTHER_STATS
    loss, aux = scorer.loss(
        lambda s: (s.mean_logit.sum(), {name: getattr(s, name) for name in names}),
        targets, ignore_index=-100, with_stats=names,
    )  # fmt: skip
    live = targets != -100
    logits = F.linear(hidden[live], weight, bias)
    expected = fastrlhf.token_stats(logits, targets[live], temperature=0.7, with_stats=names)
    for name in names:
        torch.testing.assert_close(aux[name], getattr(expected, name))
    mean = (logits / 0.7).mean(-1).sum()
    found, exact = (torch.autograd.grad(x, [hidden, weight, bias]) for x in (loss, mean))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)
