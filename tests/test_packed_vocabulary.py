"""Packed sequences in the losses from logits and from hidden states, against their padded form."""

from collections.abc import Callable

import pytest
import torch
from support.compare import assert_as_accurate
from support.matmuls import MatmulAudit
from torch import Tensor, autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fastrlhf

WIDTH, VOCAB = 5, 23
LENGTH_SETS = {
    "mixed": [4, 1, 0, 7, 3, 0], "empty first": [0, 5, 2], "one": [6], "single": [1, 1, 1],
}  # fmt: skip
PPO = {"kl_coef": 0.1, "entropy_coef": 0.01}
POLICIES = {
    "token-mean": PPO,
    "sequence-mean": {**PPO, "reduction": "sequence-mean"},
    "sequence-sum": {"reduction": "sequence-sum", "surrogate": "cispo"},
    "GSPO": {"ratio_level": "sequence", "reduction": "sequence-mean", "clip_high": 3.0},
}
PAIR_LOSSES = ["sigmoid", "ipo", "apo_zero", "aot", "simpo", "cpo", "orpo"]


class Batch:
    """Sequences of some lengths, padded; `packed` takes out of anything what is of their tokens."""

    def __init__(self, lengths: list[int], dtype: torch.dtype):
        torch.manual_seed(len(lengths))
        sizes = torch.tensor(lengths)
        self.cu_seqlens = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
        self.there = torch.arange(max(lengths)) < sizes.unsqueeze(1)
        shape = self.there.shape
        self.mask = self.there & (torch.rand(shape) < 0.8)
        self.targets = torch.where(self.mask, torch.randint(VOCAB, shape), -100)
        hidden = torch.randn(*shape, WIDTH)
        hidden[~self.mask] = torch.nan
        self.hidden, self.weight = hidden.to(dtype), torch.randn(VOCAB, WIDTH).to(dtype)
        self.bias, self.logits = torch.randn(VOCAB).to(dtype), (3 * hidden @ self.weight.float().T)
        self.logits = self.logits.to(dtype)
        self.old, self.ref, self.gain = (torch.randn(shape).double() - c for c in (3, 3, 0))
        self.of_sequences = torch.randn(len(lengths)).double()
        self.ref_sums = torch.randn(len(lengths)).double() - 9
        self.temperature = torch.linspace(0.5, 2.0, len(lengths)).double()
        last = len(lengths) - 1
        self.pairs = torch.tensor([0, last]), torch.tensor([last // 2, 0])

    def packed(self, x: Tensor, leading: tuple[int, ...]) -> Tensor:
        found = x[self.there]
        return found.reshape(*leading, *found.shape)


Run = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def policy(form: str, options: dict, advantages: str) -> Run:
    def run(b: Batch, of: Callable[[Tensor], Tensor], impl: str, leaves: list[Tensor], cu) -> tuple:
        gain = b.of_sequences if advantages == "of sequences" else of(b.gain)
        ref = of(b.ref) if options.get("kl_coef") else None
        rest = of(b.targets), of(b.old), gain, of(b.mask)
        given = {"ref_logprobs": ref, "temperature": b.temperature, "entropy": True, **options}
        if form == "logits":
            return fastrlhf.logits_policy_loss(
                leaves[0], *rest, cu_seqlens=cu, impl=impl, **given
            )  # fmt: skip
        return fastrlhf.linear_policy_loss(
            leaves[0], leaves[1], *rest, bias=leaves[2], cu_seqlens=cu, impl=impl, chunk_size=4,
            **given,
        )  # fmt: skip

    return run


def pairs(loss_type: str, reference: str) -> Run:
    def run(b: Batch, of: Callable[[Tensor], Tensor], impl: str, leaves: list[Tensor], cu) -> tuple:
        ref = None
        if loss_type not in ("simpo", "cpo", "orpo"):
            ref = b.ref_sums if reference == "of sequences" else of(b.ref)
        losses, rewards = fastrlhf.linear_dpo_loss(
            leaves[0], leaves[1], of(b.targets), ref, *b.pairs, bias=leaves[2],
            loss_type=loss_type, temperature=b.temperature, cu_seqlens=cu, impl=impl, chunk_size=4,
        )  # fmt: skip
        weights = torch.tensor([1.0, 2.0]) if reference == "of sequences" else torch.ones(2)
        return (losses * weights.to(losses)).sum(), {"losses": losses.detach(), "rewards": rewards}

    return run


def assert_packed_is_padded(run: Run, lengths, dtype, impl, leading, form="hidden") -> None:
    batch, exact = Batch(lengths, dtype), Batch(lengths, dtype)
    exact.hidden, exact.weight, exact.bias, exact.logits = (
        x.double() for x in (exact.hidden, exact.weight, exact.bias, exact.logits)
    )
    results = []
    for kind in ("exact", "padded", "packed"):
        b = exact if kind == "exact" else batch
        of = (lambda x: batch.packed(x, leading)) if kind == "packed" else (lambda x: x)
        tokens = b.logits if form == "logits" else b.hidden
        leaves = [of(tokens), b.weight, b.bias] if form == "hidden" else [of(tokens)]
        leaves = [x.clone().requires_grad_() for x in leaves]
        cu_seqlens = batch.cu_seqlens if kind == "packed" else None
        loss, metrics = run(b, of, impl, leaves, cu_seqlens)
        first, *rest = autograd.grad(loss, leaves)
        if kind == "packed":
            assert first.shape == leaves[0].shape
            first = first.reshape(-1, first.shape[-1])
        else:
            first = first[batch.there]
        results.append({"loss": loss.detach(), **metrics, "tokens": first} | dict(enumerate(rest)))
    truth, padded, found = results
    assert found.keys() == padded.keys()
    for name, value in found.items():
        assert value.dtype == padded[name].dtype
        size = max(1.0, float(truth[name].abs().max())) if truth[name].numel() else 1.0
        assert_as_accurate(value, padded[name], truth[name], size=size, of=str(name))


CASES = pytest.mark.parametrize(
    ("leading", "lengths"),
    [((), "mixed"), ((1,), "mixed"), ((), "empty first"), ((1,), "one"), ((), "single")],
    ids=str,
)


@CASES
@pytest.mark.parametrize("advantages", ["of sequences", "of tokens"])
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("options", POLICIES)
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_policy_losses(form, options, impl, advantages, leading, lengths) -> None:
    run = policy(form, POLICIES[options], advantages)
    assert_packed_is_padded(run, LENGTH_SETS[lengths], torch.float64, impl, leading, form)


@CASES
@pytest.mark.parametrize("reference", ["of sequences", "of tokens"])
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_preference_losses(loss_type, reference, leading, lengths) -> None:
    run = pairs(loss_type, reference)
    assert_packed_is_padded(run, LENGTH_SETS[lengths], torch.float64, "eager", leading)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_in_fewer_bits(impl, dtype) -> None:
    lengths = LENGTH_SETS["mixed"]
    for form in ("logits", "hidden"):
        for options in POLICIES.values():
            run = policy(form, options, "of tokens")
            assert_packed_is_padded(run, lengths, dtype, impl, (1,), form)
    assert_packed_is_padded(pairs("sigmoid", "of tokens"), lengths, dtype, impl, ())


def test_matmuls_are_those_of_the_tokens_that_count() -> None:
    batch = Batch([9, 1, 0, 14], torch.float32)
    unit = 2 * int(batch.mask.sum()) * VOCAB * WIDTH
    of = lambda x: batch.packed(x, ())  # noqa: E731
    for run in (pairs("sigmoid", "of tokens"), policy("hidden", {}, "of tokens")):
        leaves = [of(batch.hidden), batch.weight, batch.bias]
        leaves = [x.clone().requires_grad_() for x in leaves]
        with MatmulAudit() as audit:
            run_loss = run(batch, of, "eager", leaves, batch.cu_seqlens)[0]
            run_loss.backward()
        # Groups larger than a chunk are scored once more.
        assert 3 <= audit.operations / unit <= 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "^cu_seqlens: expected to end at 6"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "^cu_seqlens: expected int32 or"),
        ({"cu_seqlens": None}, ValueError, r"^targets: expected shape \(B, T\).*cu_seqlens"),
    ],
)  # fmt: skip
def test_errors_name_the_borders(change, error, message) -> None:
    tokens = 6
    given = {
        "targets": torch.zeros(tokens, dtype=torch.long), "old_logprobs": None,
        "advantages": torch.ones(tokens), "mask": torch.ones(tokens), **change,
    }  # fmt: skip
    hidden, weight = torch.randn(tokens, WIDTH), torch.randn(VOCAB, WIDTH)
    with pytest.raises(error, match=message):
        fastrlhf.linear_policy_loss(hidden, weight, **given)
    with pytest.raises(error, match=message):
        fastrlhf.logits_policy_loss(hidden @ weight.T, **given)
    one = torch.tensor([0])
    with pytest.raises(error, match=message):
        fastrlhf.linear_dpo_loss(
            hidden, weight, given["targets"], torch.zeros(1), one, one,
            cu_seqlens=given["cu_seqlens"],
        )  # fmt: skip


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_graph_serves_batches_of_other_lengths(impl, level) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(logits: Tensor, targets: Tensor, gain: Tensor, cu_seqlens: Tensor) -> Tensor:
        mask = targets != -100
        return fastrlhf.logits_policy_loss(
            logits, targets, None, gain, mask, cu_seqlens=cu_seqlens, ratio_level=level, impl=impl,
            reduction="sequence-mean",
        )[0]  # fmt: skip

    for lengths in ([4, 3, 2, 5], [6, 2, 3], [1, 7, 2, 2, 3], [9, 8, 2, 3, 4, 2]):
        batch = Batch(lengths, torch.float32)
        logits, targets = batch.packed(batch.logits, ()), batch.packed(batch.targets, ())
        logits.requires_grad_()
        arguments = logits, targets, batch.of_sequences, batch.cu_seqlens
        found = step(*arguments)
        plain = step._torchdynamo_orig_callable(*arguments)
        torch.testing.assert_close(found, plain)
        a, b = (autograd.grad(x, logits)[0] for x in (found, plain))
        torch.testing.assert_close(a, b)
    # One for the first shape, one for all others.
    assert counter.frame_count <= 2
