"""KTO: its second type, its baseline over ranks, and from hidden states and models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate, relative_error
from support.preference_formulas import expected_kto, expected_rewards
from support.tiny_models import make
from torch import Tensor

import fastrlhf
from fastrlhf import dpo_loss, kto_kl, kto_loss

DESIRABLE = torch.tensor([True, False, True, False, True])
FINE = [torch.float64, torch.float32]


def sums(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ref = -60 * torch.rand(5, dtype=torch.float64)
    pi = ref + 6 * torch.randn(5, dtype=torch.float64)
    return pi.to(dtype).requires_grad_(), ref.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", FINE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_apo_zero_of_single_sequences(scale: float, dtype: torch.dtype) -> None:
    pi, ref = ((scale * x.detach()).requires_grad_() for x in sums(dtype))
    losses, rewards = kto_loss(
        pi, ref, DESIRABLE, None, 0.2, loss_type="apo_zero_unpaired", desirable_weight=1.5
    )
    # 1 - σ(β·s) or σ(β·s): what KTO is where its baseline is 0.
    expected = expected_kto(pi, ref, DESIRABLE, [0.0] * 5, 0.2, 1.5, 1.0)
    expected.assert_losses(losses)
    expected.assert_gradients(*torch.autograd.grad(losses.sum(), (pi, ref)), floor=0.2)
    expected_rewards(pi, ref, 0.2).assert_losses(rewards)


def test_two_of_them_are_the_apo_zero_of_a_pair() -> None:
    pi, ref = sums(torch.float64)
    losses, _ = kto_loss(pi, ref, DESIRABLE, None, 0.2, loss_type="apo_zero_unpaired")
    pair = torch.tensor([0]), torch.tensor([1])
    expected, _ = dpo_loss(pi, ref, *pair, 0.2, loss_type="apo_zero")
    torch.testing.assert_close(losses[:2].sum(), expected[0])


def test_a_baseline_of_one_element_is_one_for_all() -> None:
    pi, ref = sums(torch.float64)
    expected = kto_loss(pi, ref, DESIRABLE, 0.7)[0]
    assert torch.equal(
        kto_loss(pi, ref, DESIRABLE, torch.tensor([0.7], dtype=torch.float64))[0], expected
    )


@pytest.mark.parametrize("dtype", [*FINE, torch.bfloat16], ids=str)
def test_the_baseline_is_the_mean_of_the_batch_and_not_negative(dtype: torch.dtype) -> None:
    pi, ref = (x.detach() for x in sums(dtype))
    for a, b in ((pi, ref), (ref, pi)):
        found = kto_kl(a.requires_grad_(), b)
        exact = (a.double() - b.double()).mean().clamp(min=0)
        plain = (a.float() - b.float()).mean().clamp(min=0).to(found.dtype)
        assert found.ndim == 0 and not found.requires_grad
        assert found.dtype == (dtype if dtype in FINE else torch.float32)
        assert_as_accurate(found, plain, exact, size=60.0)
    assert kto_kl(torch.zeros(0), torch.zeros(0)) == 0


WIDTH, VOCAB, TOKENS = 7, 37, 6
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kto": (0.3, {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    "a baseline each": (torch.tensor([0.1, 0.2, -1.0, 0.4, 2.0]).double(), {}),
    "apo": (None, {"loss_type": "apo_zero_unpaired"}),
}


def head(trained: bool = True) -> dict[str, Tensor]:
    targets = torch.randint(VOCAB, (5, TOKENS))
    lengths = torch.tensor([4, 2, 0, 1, 3])
    targets[:, :2] = -100
    targets[torch.arange(TOKENS) >= 2 + lengths[:, None]] = -100
    hidden = torch.randn(5, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        hidden[targets == -100] = torch.nan
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=trained)
    ref = -12 * torch.rand(5, dtype=torch.float64)
    return {"hidden": hidden, "weight": weight, "targets": targets, "ref": ref}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("upstream", ["mean", "weighed"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_from_hidden_states(name: str, trained: bool, upstream: str, layout: str) -> None:
    x, (kl, options) = head(trained), OPTIONS[name]
    live = x["targets"] != -100
    logits = torch.where(live[..., None], x["hidden"], 0.0) @ x["weight"].T
    ids = torch.where(live, x["targets"], 0)[..., None]
    logprobs = logits.log_softmax(-1).gather(-1, ids)[..., 0]
    wanted = kto_loss((logprobs * live).sum(-1), x["ref"], DESIRABLE, kl, 0.2, **options)
    hidden, targets, more = x["hidden"], x["targets"], {}
    if layout == "packed":
        keep = torch.arange(TOKENS) < torch.tensor([6, 4, 2, 3, 5])[:, None]
        hidden, targets = hidden[keep], targets[keep]
        more = {"cu_seqlens": F.pad(keep.sum(-1).cumsum(0), (1, 0))}
    found = fastrlhf.linear_kto_loss(
        hidden, x["weight"], targets, x["ref"], DESIRABLE, kl, 0.2, chunk_size=4, impl="eager",
        **more, **options,
    )  # fmt: skip
    weights = torch.linspace(-1, 2, 5).double() if upstream == "weighed" else torch.ones(5).double()
    of = [x["hidden"], *([x["weight"]] if trained else [])]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((found[0] * weights).sum(), of),
        torch.autograd.grad((wanted[0] * weights).sum(), of),
        strict=True,
    ):
        torch.testing.assert_close(a, b.nan_to_num(0.0), rtol=1e-9, atol=1e-11)


def test_a_reference_that_needs_a_gradient_gets_it() -> None:
    x = head()
    x["ref"].requires_grad_()
    losses, _ = fastrlhf.linear_kto_loss(
        x["hidden"], x["weight"], x["targets"], x["ref"], DESIRABLE, 0.1, 0.2, impl="eager"
    )
    (found,) = torch.autograd.grad(losses.sum(), x["ref"])
    assert (found != 0).all()
    assert torch.equal(found > 0, DESIRABLE)


def test_a_second_derivative_is_right_or_an_error() -> None:
    x = head(trained=True)
    call = (x["hidden"], x["weight"], x["targets"], x["ref"], DESIRABLE, 0.1, 0.2)
    losses, _ = fastrlhf.linear_kto_loss(*call, impl="eager")
    with pytest.raises(RuntimeError, match=r"^linear_kto_loss: .*cannot be differentiated"):
        torch.autograd.grad(losses.sum(), x["weight"], create_graph=True)
    with torch.no_grad():
        x["hidden"][x["targets"] == -100] = 0.0  # finite differences cannot step from NaN
    weight = x["weight"].detach()

    def losses_of(hidden: Tensor) -> Tensor:
        return fastrlhf.linear_kto_loss(hidden, weight, *call[2:], impl="eager")[0]

    assert torch.autograd.gradcheck(losses_of, (x["hidden"],), fast_mode=True)
    assert torch.autograd.gradgradcheck(losses_of, (x["hidden"],), fast_mode=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_of_a_model(name: str) -> None:
    model, (kl, options) = make("Llama").double(), OPTIONS[name]
    ids, attention = torch.randint(3, 30, (5, 7)), torch.ones(5, 7, dtype=torch.long)
    mask = torch.arange(7).expand(5, 7) > 2
    ref = -20 * torch.rand(5, dtype=torch.float64)
    logprobs = fastrlhf.model_token_stats(model, ids, attention, mask=mask).logprob
    wanted = kto_loss(
        fastrlhf.sequence_logprobs(logprobs, mask[:, 1:]), ref, DESIRABLE, kl, 0.2, **options
    )
    losses, rewards, outputs = fastrlhf.model_kto_loss(
        model, ids, attention, ref, DESIRABLE, kl, 0.2, mask=mask, return_outputs=True, **options
    )
    torch.testing.assert_close((losses, rewards), wanted)
    assert outputs.logits is None
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(losses.mean(), parameters),
        torch.autograd.grad(wanted[0].mean(), parameters),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-9


_FOUR = torch.zeros(4)
_HEAD = {
    "hidden": torch.zeros(4, 3, 2), "weight": torch.zeros(5, 2),
    "targets": torch.ones(4, 3).long(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"loss_type": "bco"}, ValueError, "loss_type: expected one of kto, apo_zero_unpaired"),
        ({"loss_type": "apo_zero_unpaired"}, ValueError, "kl: expected None"),
        ({"kl": None}, ValueError, "kl: expected a number or a tensor for loss_type 'kto'"),
        ({"kl": torch.zeros(2)}, ValueError, r"kl: .*\(4,\).*got \(2,\)"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps: .*\(4,\)"),
        ({"ref_logps": _FOUR.long()}, TypeError, "ref_logps: .*floating"),
        ({"desirable": torch.ones(3)}, ValueError, r"desirable: .*\(4,\)"),
        ({"beta": 0.0}, ValueError, "beta: "),
        ({"desirable_weight": -1.0}, ValueError, "desirable_weight: "),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    shared = {"ref_logps": _FOUR, "desirable": _FOUR > 0, "kl": 0.0}
    with pytest.raises(error, match=f"^{message}"):
        kto_loss(**{"pi_logps": _FOUR, **shared, **changed})
    with pytest.raises(error, match=f"^{message}"):
        fastrlhf.linear_kto_loss(**{**_HEAD, **shared, **changed})


def test_errors_of_single_functions_name_the_argument() -> None:
    with pytest.raises(TypeError, match=r"^linear_kto_loss: unexpected option 'gamma'"):
        fastrlhf.linear_kto_loss(*_HEAD.values(), _FOUR, _FOUR > 0, 0.0, gamma=1.0)
    with pytest.raises(ValueError, match=r"^pi_logps: expected shape \(B,\)"):
        kto_kl(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"^group: "):
        kto_kl(_FOUR, _FOUR, group="world")
