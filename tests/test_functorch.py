"""torch.func over every operation with derivatives or kernels of its own: grad, vmap, jvp, ...

Values are those of autograd, sample by sample, outside of any transform; or a refusal that says
what to call.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from transformers import LlamaConfig, LlamaForCausalLM

import fastrlhf as fr

S, B, T, H, V = 3, 2, 4, 5, 7  # samples, and the shape of one
DTYPE = torch.float64
BACKENDS = ["eager", "triton"]

RANDOM = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    """Numbers that are the same whichever test runs first."""
    return torch.randn(shape, generator=RANDOM, dtype=DTYPE)


TARGETS = torch.tensor([[1, -100, 6, 0], [3, 3, -100, 2]])
MASK = TARGETS != -100
OLD, REF, ADVANTAGES = normal(3, B, T)
WEIGHT, BIAS, REF_HIDDEN = normal(V, H), normal(V), normal(B, T, H)
RANKS, PAIRS = torch.tensor([2, 0, 1, 0]), (torch.tensor([0]), torch.tensor([1]))
TEMPERATURES = normal(B, T).square() + 0.5
WORDS = normal(B, T, V).log_softmax(-1).topk(3)


class Case(NamedTuple):
    """A scalar function of one tensor, and the shape of that."""

    function: Callable[[Tensor, str], Tensor]
    shape: tuple[int, ...]


def of_stats(stats: fr.TokenStats) -> Tensor:
    return (stats.logprob * OLD).sum() + (stats.entropy * REF).sum()


def of_a_policy(loss_and_metrics: tuple[Tensor, dict]) -> Tensor:
    return loss_and_metrics[0]


def policy_arguments() -> tuple[Tensor, ...]:
    return OLD, ADVANTAGES, MASK


POLICY_OPTIONS = {"ref_logprobs": REF, "kl_coef": 0.1, "entropy_coef": 0.01}
CASES = {
    "token_stats": Case(
        lambda x, impl: of_stats(
            fr.token_stats(
                x, TARGETS, entropy=True, softcap=3.0, temperature=TEMPERATURES, impl=impl
            )
        ),
        (B, T, V),
    ),
    "token_logprobs": Case(
        lambda x, impl: (fr.token_logprobs(x, TARGETS, inplace_backward=True, impl=impl) * OLD)
        .square()
        .sum(),
        (B, T, V),
    ),
    "linear_token_stats": Case(
        lambda h, impl: of_stats(
            fr.linear_token_stats(
                h, WEIGHT, TARGETS, bias=BIAS, entropy=True, scale=0.5, chunk_size=2, impl=impl
            )
        ),
        (B, T, H),
    ),
    "linear_token_logprobs of a weight": Case(
        lambda w, impl: fr.linear_token_logprobs(REF_HIDDEN, w, TARGETS, impl=impl).square().sum(),
        (V, H),
    ),
    "cross_entropy": Case(
        lambda x, impl: fr.cross_entropy(
            x, TARGETS, label_smoothing=0.1, z_loss=0.02, weights=OLD, softcap=3.0,
            temperature=TEMPERATURES, impl=impl,
        ),
        (B, T, V),
    ),
    "kl_divergence": Case(
        lambda x, impl: (
            fr.kl_divergence(x, x.square(), mask=MASK, temperature=TEMPERATURES, impl=impl) * OLD
        ).sum(),
        (B, T, V),
    ),
    "jsd": Case(
        lambda x, impl: fr.kl_divergence(x, x.sin(), direction="jsd", impl=impl).square().sum(),
        (B, T, V),
    ),
    "linear_kl_divergence": Case(
        lambda h, impl: fr.linear_kl_divergence(
            h, WEIGHT, REF_HIDDEN, WEIGHT.sin(), mask=MASK, bias=BIAS, direction="forward",
            impl=impl,
        ).square().sum(),
        (B, T, H),
    ),
    "topk_kl_divergence": Case(
        lambda x, impl: (
            fr.topk_kl_divergence(
                x, *WORDS, direction="jsd", mask=MASK, temperature=TEMPERATURES, impl=impl
            ) * OLD
        ).sum(),
        (B, T, V),
    ),
    "linear_topk_kl_divergence": Case(
        lambda h, impl: fr.linear_topk_kl_divergence(
            h, WEIGHT, *WORDS, mask=MASK, bias=BIAS, direction="skewed_reverse", impl=impl
        ).square().sum(),
        (B, T, H),
    ),
    "dpo_loss": Case(
        lambda x, impl: fr.dpo_loss(x, REF, *PAIRS, mask=MASK, impl=impl)[0].square().sum(), (B, T)
    ),
    "dpo_loss of a reference": Case(
        lambda x, impl: fr.dpo_loss(
            OLD, x, *PAIRS, mask=MASK, loss_type="ipo", impl=impl
        )[0].square().sum(),
        (B, T),
    ),
    "linear_dpo_loss": Case(
        lambda w, impl: fr.linear_dpo_loss(
            REF_HIDDEN, w, TARGETS, REF.sum(-1), *PAIRS, impl=impl
        )[0].square().sum(),
        (V, H),
    ),
    "logits_policy_loss": Case(
        lambda x, impl: of_a_policy(
            fr.logits_policy_loss(x, TARGETS, *policy_arguments(), **POLICY_OPTIONS, impl=impl)
        ),
        (B, T, V),
    ),
    "logits_policy_loss on policy": Case(
        lambda x, impl: of_a_policy(
            fr.logits_policy_loss(
                x, TARGETS, None, ADVANTAGES, MASK, inplace_backward=True, impl=impl
            )
        ),
        (B, T, V),
    ),
    "linear_policy_loss": Case(
        lambda h, impl: of_a_policy(
            fr.linear_policy_loss(
                h, WEIGHT, TARGETS, *policy_arguments(), **POLICY_OPTIONS,
                ratio_level="sequence", impl=impl,
            )
        ),
        (B, T, H),
    ),
    "policy_loss": Case(
        lambda x, impl: of_a_policy(fr.policy_loss(x, *policy_arguments(), surrogate="sapo")),
        (B, T),
    ),
    "value_loss": Case(lambda x, impl: fr.value_loss(x, OLD, REF, MASK)[0], (B, T)),
    "process_reward_loss": Case(
        lambda x, impl: fr.process_reward_loss(x, REF.sigmoid(), MASK)[0], (B, T, 2)
    ),
    "process_reward_scores": Case(
        lambda x, impl: fr.process_reward_scores(x, MASK, "mean").square().sum(), (B, T)
    ),
    "reward_loss": Case(lambda x, impl: fr.reward_loss(x[0], x[1])[0].square().sum(), (B, T)),
    "plackett_luce_loss": Case(
        lambda x, impl: fr.plackett_luce_loss(x, torch.tensor([1, 1, 1, 4]), RANKS).square().sum(),
        (T,),
    ),
    "simpo_loss": Case(
        lambda x, impl: fr.simpo_loss(
            fr.sequence_logprobs(x, MASK), MASK.sum(-1), *PAIRS
        )[0].square().sum(),
        (B, T),
    ),
    "cpo_loss": Case(lambda x, impl: fr.cpo_loss(x, *PAIRS)[0].square().sum(), (B,)),
    "orpo_loss": Case(
        lambda x, impl: fr.orpo_loss(-x.square() - 1, MASK.sum(-1), *PAIRS)[0].square().sum(), (B,)
    ),
    "kto_loss": Case(
        lambda x, impl: fr.kto_loss(x, REF[:, 0], torch.tensor([True, False]), 0.1)[0].sum(), (B,)
    ),
    "dpo_loss, aot": Case(
        lambda x, impl: fr.dpo_loss(x, REF, *PAIRS, mask=MASK, loss_type="aot")[0].sum(), (B, T)
    ),
    "whiten": Case(lambda x, impl: (fr.whiten(x, MASK) * OLD).sum(), (B, T)),
    "kl_penalty": Case(lambda x, impl: (fr.kl_penalty(x, REF, "k3") * OLD).sum(), (B, T)),
}  # fmt: skip


def inputs(case: Case) -> Tensor:
    return torch.randn(S, *case.shape, dtype=DTYPE)


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient outside of any transform, by the function's own backward."""
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(function(x * 1), x)
    return found


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_first_derivatives_are_those_of_autograd(name: str, impl: str) -> None:
    case = CASES[name]
    x, tangent = inputs(case), inputs(case)

    def function(x: Tensor) -> Tensor:
        return case.function(x, impl)

    values = torch.stack([function(row) for row in x])
    gradients = torch.stack([by_autograd(function, row) for row in x])
    assert gradients.abs().max() > 1e-4
    slopes = (gradients * tangent).flatten(1).sum(1)
    torch.testing.assert_close(vmap(function)(x), values)
    torch.testing.assert_close(grad(function)(x[0]), gradients[0])
    torch.testing.assert_close(vmap(grad(function))(x), gradients)
    torch.testing.assert_close(jacrev(function)(x[0]), gradients[0])
    torch.testing.assert_close(jacfwd(function)(x[0]), gradients[0])
    value, slope = jvp(function, (x[1],), (tangent[1],))
    torch.testing.assert_close((value, slope), (values[1], slopes[1]))
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(function(forward_ad.make_dual(x[2], tangent[2])))
        torch.testing.assert_close((moved.primal, moved.tangent), (values[2], slopes[2]))


@pytest.mark.parametrize(
    "name",
    [
        "token_stats",
        "cross_entropy",
        "linear_token_stats",
        "kl_divergence",
        "dpo_loss",
        "linear_dpo_loss",
    ],
)
def test_hessians_are_those_of_autograd(name: str) -> None:
    case = CASES[name]
    x = inputs(case)[0]

    def function(x: Tensor) -> Tensor:
        return case.function(x, "eager")

    # linear_dpo_loss with a trained head has no second derivative of its own.
    plain = _dense_dpo if name == "linear_dpo_loss" else function
    expected = torch.autograd.functional.hessian(plain, x)
    torch.testing.assert_close(hessian(function)(x), expected)


def _dense_dpo(weight: Tensor) -> Tensor:
    log_p = (REF_HIDDEN @ weight.T).log_softmax(-1)
    tokens = log_p.gather(-1, TARGETS.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    scores = (tokens * MASK).sum(-1) - REF.sum(-1)
    return torch.nn.functional.logsigmoid(0.1 * (scores[0] - scores[1])).square()


@pytest.mark.parametrize("impl", BACKENDS)
def test_gradients_of_each_sample_with_targets_of_its_own(impl: str) -> None:
    logits = torch.randn(S, T, V, dtype=DTYPE)
    targets = torch.randint(V, (S, T))
    targets[0, 1] = -100

    def loss(logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        return fr.token_logprobs(logits, targets, temperature=temperature, impl=impl).square().sum()

    temperatures = torch.rand(S, T) + 0.5
    found = vmap(grad(loss))(logits, targets, temperatures)
    for i in range(S):
        expected = by_autograd(lambda x, i=i: loss(x, targets[i], temperatures[i]), logits[i])
        torch.testing.assert_close(found[i], expected)
    assert (found[0, 1] == 0).all()


@pytest.mark.parametrize("impl", BACKENDS)
def test_many_gradients_at_once_outside_of_torch_func(impl: str) -> None:
    """is_grads_batched, by which torch.autograd.functional vectorises, runs backwards in vmap."""
    for function, shape in (
        (lambda x: fr.token_logprobs(x, TARGETS, impl=impl), (B, T, V)),
        (lambda h: fr.linear_token_logprobs(h, WEIGHT, TARGETS, impl=impl), (B, T, H)),
        (lambda w: fr.linear_token_logprobs(REF_HIDDEN, w, TARGETS, impl=impl), (V, H)),
        (lambda x: fr.kl_divergence(x, x.sin(), impl=impl), (B, T, V)),
        (lambda x: fr.dpo_loss(x, REF, *PAIRS, mask=MASK, impl=impl)[0], (B, T)),
    ):
        x = torch.randn(shape, dtype=DTYPE, requires_grad=True)
        values = function(x * 1)
        one_each = torch.eye(values.numel(), dtype=DTYPE).view(-1, *values.shape)

        def pull_back(v: Tensor, values: Tensor = values, x: Tensor = x, **options) -> Tensor:
            return torch.autograd.grad(values, x, v, retain_graph=True, **options)[0]

        expected = torch.stack([pull_back(v) for v in one_each])
        torch.testing.assert_close(vmap(pull_back)(one_each), expected)
        torch.testing.assert_close(pull_back(one_each, is_grads_batched=True), expected)


def test_what_is_known_only_once_refuses_many_gradients_at_once() -> None:
    def loss(weight: Tensor) -> Tensor:
        return fr.linear_loss(lambda stats: stats.logprob.sum(), REF_HIDDEN, weight, TARGETS)[0]

    weight = WEIGHT.clone().requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"linear_loss's backward: .* use linear_token_stats"):
        torch.autograd.grad(loss(weight), weight, torch.ones(2, dtype=DTYPE), is_grads_batched=True)


@pytest.mark.parametrize("impl", BACKENDS)
def test_fisher_products_and_advantages_are_batched_but_not_differentiated(impl: str) -> None:
    logits, tangent = torch.randn(2, S, B, T, V, dtype=DTYPE)
    rewards, values = torch.randn(2, S, B, T, dtype=DTYPE)
    for function, arguments in (
        (lambda x, u: fr.softmax_fisher_product(x, u, mask=MASK, impl=impl), (logits, tangent)),
        (lambda r, v: fr.gae(r, v, MASK, gamma=0.9, impl=impl), (rewards, values)),
    ):
        expected = [torch.stack(x) for x in zip(*map(function, *arguments), strict=True)]
        torch.testing.assert_close(list(vmap(function)(*arguments)), expected)
        first = tuple(x[0] for x in arguments)
        _, slopes = jvp(function, first, first)
        assert all((slope == 0).all() for slope in slopes)
        gradient = grad(lambda x, f=function, y=first[1]: f(x, y)[0].sum())(first[0])
        assert (gradient == 0).all()


def test_other_constants_are_batched() -> None:
    scores, groups = torch.randn(S, 6, dtype=DTYPE), torch.tensor([0, 1, 0, 1, 1, 0])
    for kind in ("grpo", "rloo", "reinforce++"):
        expected = torch.stack([fr.group_advantages(x, groups, kind=kind) for x in scores])
        found = vmap(lambda x, k=kind: fr.group_advantages(x, groups, kind=k))(scores)
        torch.testing.assert_close(found, expected)
    logprobs = torch.randn(S, B, T, dtype=DTYPE)

    def rewards(x: Tensor) -> Tensor:
        return fr.shaped_rewards(OLD[:, 0], x, REF, MASK, kl_coef=0.1)

    torch.testing.assert_close(vmap(rewards)(logprobs), torch.stack([*map(rewards, logprobs)]))
    ids = torch.randint(V, (S, B, T))
    expected = torch.stack([fr.shift_targets(x, MASK) for x in ids])
    torch.testing.assert_close(vmap(lambda x: fr.shift_targets(x, MASK))(ids), expected)


def test_gradients_of_each_sample_with_respect_to_a_model() -> None:
    config = LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=T,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(V, (S, T))
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        def scores() -> Tensor:
            return fr.model_token_stats(model, ids.unsqueeze(0)).logprob.sum()

        with_these = {f"model.{name}": x for name, x in parameters.items()}
        return functional_call(_Calls(model, scores), with_these, ())

    with pytest.raises(RuntimeError, match="call model_token_stats once outside"):
        vmap(grad(loss), (None, 0))(parameters, ids)
    expected = [torch.autograd.grad(loss(parameters, x), parameters.values()) for x in ids]
    found = vmap(grad(loss), (None, 0))(parameters, ids)
    for i, (name, of_name) in enumerate(found.items()):
        assert name in parameters
        torch.testing.assert_close(of_name, torch.stack([sample[i] for sample in expected]))


class _Calls(torch.nn.Module):
    """A module around a function of another one, for functional_call."""

    def __init__(self, model: torch.nn.Module, function: Callable[[], Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function()


def _linear_loss(hidden: Tensor) -> Tensor:
    return fr.linear_loss(lambda stats: stats.logprob.sum(), hidden, WEIGHT, TARGETS)[0]


def _linear_fisher(hidden: Tensor) -> Tensor:
    return fr.linear_softmax_fisher_product(hidden, WEIGHT, REF_HIDDEN)[1].sum()


REFUSALS = {
    "linear_loss: .*use linear_token_stats and a loss of it": _linear_loss,
    "linear_softmax_fisher_product: .*use softmax_fisher_product": _linear_fisher,
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_transformed_is_refused(message: str) -> None:
    function = REFUSALS[message]
    hidden = REF_HIDDEN.expand(S, B, T, H)
    for call in (
        lambda: grad(function)(REF_HIDDEN),
        lambda: vmap(function)(hidden),
        lambda: vmap(grad(function))(hidden),
        lambda: jvp(function, (REF_HIDDEN,), (REF_HIDDEN,)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    function(REF_HIDDEN)  # and works where nothing transforms it


def test_rankings_cannot_be_batched() -> None:
    groups = torch.zeros(S, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="plackett_luce_loss: does not work with groups"):
        vmap(lambda g: fr.plackett_luce_loss(OLD[0], g, RANKS))(groups)


def test_what_tensors_hold_is_checked_unless_vmap_hides_it() -> None:
    logits, wrong = torch.randn(S, T, V), torch.full((S, T), V)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return fr.token_logprobs(logits, targets).sum()

    with pytest.raises(ValueError, match=r"targets: expected indices in \[0, 7\)"):
        grad(loss)(logits[0], wrong[0])
    with pytest.raises(ValueError, match=r"targets: expected indices in \[0, 7\)"):
        vmap(loss, (0, None))(logits, wrong[0])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        vmap(loss)(logits, wrong)
    with pytest.raises(ValueError, match="temperature: expected positive"):
        grad(lambda x: fr.token_logprobs(x, wrong[0] * 0, temperature=torch.zeros(T)).sum())(
            logits[0]
        )
    with pytest.raises(ValueError, match='impl: expected "auto"'):
        grad(lambda x: fr.token_logprobs(x, wrong[0] * 0, impl="fast").sum())(logits[0])


@pytest.mark.parametrize(
    "name",
    [
        "token_stats",
        "cross_entropy",
        "linear_token_stats",
        "kl_divergence",
        "dpo_loss",
        "logits_policy_loss",
    ],
)
def test_transforms_can_be_compiled(name: str) -> None:
    case = CASES[name]
    x = inputs(case)

    def function(x: Tensor) -> Tensor:
        return case.function(x, "eager")

    expected = torch.stack([by_autograd(function, row) for row in x])
    found = torch.compile(vmap(grad(function)), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
