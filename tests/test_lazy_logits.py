"""Lazy logits: the tensor, what turns it on and off, what it refuses, and what the report says."""

import contextlib
import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from support.matmuls import MatmulAudit
from support.tiny_models import VOCAB, make
from torch import Tensor, nn

import fastrlhf

SEQUENCES, TOKENS = 3, 9


@pytest.fixture(autouse=True)
def _no_report_of_others():
    fastrlhf.lazy_report(clear=True)


@pytest.fixture
def model() -> nn.Module:
    return make("Llama")


def ids() -> Tensor:
    return torch.randint(1, VOCAB, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))


def nll(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids()[:, 1:].reshape(-1))


def test_the_tensor_has_the_form_of_the_logits(model) -> None:
    plain = model(ids()).logits
    with fastrlhf.lazy_logits(model):
        lazy = model(ids()).logits
    assert isinstance(lazy, Tensor)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout"):
        assert getattr(lazy, name) == getattr(plain, name), name
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__"):
        assert getattr(lazy, name)() == getattr(plain, name)(), name
    assert lazy.grad_fn is not None
    assert fastrlhf.lazy_report().built == ()
    assert torch.equal(lazy + 0, plain)  # and once it is built, the model's own bits
    with torch.no_grad(), fastrlhf.lazy_logits(model):
        assert not model(ids()).logits.requires_grad


def test_logits_that_are_moved_to_where_they_are_stay_lazy(model) -> None:
    with fastrlhf.lazy_logits(model):
        logits = model(ids()).logits
    for place in (Tensor.cpu, lambda x: x.to("cpu"), lambda x: x.to(x.device)):
        assert place(logits) is logits
    assert fastrlhf.lazy_report().built == ()


def test_words_are_taken_along_a_dim(model) -> None:
    log_p = model(ids()).logits.log_softmax(-1)
    expected = torch.take_along_dim(log_p, ids()[..., None], -1)
    broadcast = torch.take_along_dim(log_p, ids()[:1, :, None], -1)
    with fastrlhf.lazy_logits(model):
        lazy = model(ids()).logits.log_softmax(-1)
    torch.testing.assert_close(lazy.take_along_dim(ids()[..., None], -1), expected)
    assert fastrlhf.lazy_report().built == ()
    assert torch.equal(torch.take_along_dim(lazy, ids()[:1, :, None], -1), broadcast)
    assert [use.what for use in fastrlhf.lazy_report().built] == ["take_along_dim"]


def test_on_and_off_leave_the_model_as_it_was(model) -> None:
    def state() -> tuple:
        head = model.lm_head
        hooks = (len(head._forward_hooks), len(head._forward_pre_hooks))
        return type(head), head.forward.__func__, sorted(vars(head)), hooks, repr(model)

    before = state()
    with fastrlhf.lazy_logits(model):
        assert nll(model(ids()).logits) > 0
        with fastrlhf.lazy_logits(model):
            pass
        nll(model(ids()).logits)
        assert len(fastrlhf.lazy_report().fused) == 1
        assert fastrlhf.lazy_report().fused[0].calls == 2
        assert isinstance(model.lm_head, nn.Linear)
    assert state() == before
    fastrlhf.enable_lazy_logits(model)
    fastrlhf.enable_lazy_logits(model)
    fastrlhf.disable_lazy_logits(model)
    assert state() == before
    fastrlhf.disable_lazy_logits(model)
    assert state() == before
    with pytest.raises(KeyError), fastrlhf.lazy_logits(model):
        raise KeyError
    assert state() == before


def test_logits_outlive_the_context(model) -> None:
    with fastrlhf.lazy_logits(model):
        lazy = model(ids()).logits
    expected = nll(model(ids()).logits)
    torch.testing.assert_close(nll(lazy), expected)
    assert fastrlhf.lazy_report().built == ()


class _OwnHead(nn.Module):
    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


def test_a_head_of_unknown_class_is_refused_by_name(model) -> None:
    model.lm_head = _OwnHead(model.lm_head)
    with pytest.raises(TypeError, match="_OwnHead, of which fastrlhf does not know"):
        fastrlhf.enable_lazy_logits(model)
    assert type(model.lm_head) is _OwnHead
    assert type(model(ids()).logits) is Tensor
    with pytest.raises(TypeError, match="_OwnHead"), fastrlhf.lazy_logits(model):
        raise AssertionError("the context was entered")
    with pytest.raises(TypeError, match="expected a causal language model"):
        fastrlhf.enable_lazy_logits(nn.Linear(2, 2))


def test_logits_are_asked_for_before_the_weight_changes(model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastrlhf.lazy_logits(model):
        outputs = model(ids(), labels=ids())
        outputs.loss.backward()
        accuracy = (outputs.logits.argmax(-1) == ids()).float().mean()
        optimizer.step()
        assert 0 <= accuracy <= 1
        for ask in (nll, torch.sigmoid, lambda x: x.argmax(-1), lambda x: x[:, -1].sum().item()):
            with pytest.raises(RuntimeError, match=r"lazy_logits: .* after its head's weight"):
                ask(outputs.logits)
        built = model(ids()).logits
        before = built.sigmoid()
        optimizer.step()
        assert torch.equal(built.sigmoid(), before)  # they are there


def test_the_report_tells_what_was_fused_and_what_was_built(model, caplog) -> None:
    assert str(fastrlhf.lazy_report()) == "no lazy logits were used"
    caplog.set_level(logging.WARNING)
    with fastrlhf.lazy_logits(model):
        for _ in range(3):
            logits = model(ids()).logits
            nll(logits).backward()
            logits.sigmoid()
            logits.cos()  # of what was built already
    report = fastrlhf.lazy_report()
    (fused,), (built,) = report.fused, report.built
    here = f"{__file__}:"
    assert fused.what == "cross_entropy"
    assert fused.plan == "3G"
    assert fused.calls == 3
    assert fused.tokens == 3 * SEQUENCES * (TOKENS - 1)
    assert fused.site.startswith(here)
    assert fused.bytes == 0
    assert built.what == "sigmoid"
    assert built.calls == 3
    assert built.bytes == 3 * 4 * SEQUENCES * TOKENS * VOCAB
    assert built.site.startswith(here)
    table = str(report).splitlines()
    assert [line.split()[0] for line in table] == ["what", "fused", "built"]
    assert "sigmoid" in table[2]
    assert built.site in table[2]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, said
    assert "sigmoid builds the logits" in said[0]
    assert built.site in said[0]
    fastrlhf.lazy_report(clear=True)
    assert str(fastrlhf.lazy_report()) == "no lazy logits were used"


@pytest.mark.parametrize(
    ("trained", "ask", "plans"),
    [
        (True, lambda z, t: F.cross_entropy(z.transpose(1, 2), t), ["3G"]),
        (False, lambda z, t: F.cross_entropy(z.transpose(1, 2), t), ["2G"]),
        (True, lambda z, t: z.log_softmax(-1).gather(-1, t[..., None]).sum(), ["4G"]),
        (False, lambda z, t: z.log_softmax(-1).gather(-1, t[..., None]).sum(), ["2G"]),
        (True, lambda z, t: z.logsumexp(-1).sum() - z.softmax(-1).mul(z).sum(), ["4G", "0G"]),
        (True, lambda z, t: z.detach().logsumexp(-1).sum(), ["1G"]),
        (True, lambda z, t: z.gather(-1, t[..., None]).sum(), ["0G"]),
    ],
)
def test_the_plan_is_what_is_multiplied(model, trained: bool, ask, plans: list[str]) -> None:
    model.lm_head.weight.requires_grad_(trained)
    audit = MatmulAudit(VOCAB)
    with fastrlhf.lazy_logits(model):
        ask(model(ids()).logits, ids())  # the first call looks at the head
        fastrlhf.lazy_report(clear=True)
        logits = model(ids()).logits
        with audit:
            found = ask(logits, ids())
            if found.requires_grad:
                found.backward()
    assert [use.plan for use in fastrlhf.lazy_report().fused] == plans
    matmuls = audit.operations / (2 * SEQUENCES * TOKENS * VOCAB * model.config.hidden_size)
    assert matmuls == pytest.approx(sum(int(plan[:-1]) for plan in plans), abs=0.01)


def test_one_position_is_computed_at_once(model) -> None:
    with fastrlhf.lazy_logits(model):
        assert type(model(ids()[:, :1]).logits) is Tensor
        assert type(model(ids(), logits_to_keep=1).logits) is Tensor
        greedy = model.generate(ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy, model.generate(ids(), max_new_tokens=4, do_sample=False))
    assert fastrlhf.lazy_report().built == ()


def test_copies_of_a_model_are_plain(model) -> None:
    with fastrlhf.lazy_logits(model):
        copied = copy.deepcopy(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        assert type(copied(ids()).logits) is Tensor
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert type(loaded.lm_head) is nn.Linear
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_outputs_are_saved_and_printed_as_plain_ones(model) -> None:
    plain = model(ids()).logits.detach()
    with torch.no_grad(), fastrlhf.lazy_logits(model):
        logits = [model(ids()).logits for _ in range(5)]
    saved = io.BytesIO()
    torch.save({"logits": logits[0]}, saved)
    saved.seek(0)
    found = torch.load(saved)["logits"]
    assert type(found) is Tensor
    assert torch.equal(found, plain)
    assert repr(logits[1]) == repr(plain)
    assert logits[2].tolist() == plain.tolist()
    assert (logits[3].numpy() == plain.numpy()).all()
    assert torch.equal(copy.deepcopy(logits[4]), plain)


def test_no_more_than_an_eighth_of_the_logits_is_held() -> None:
    model, ids = make("Llama", vocab_size=4096), torch.randint(1, 4096, (8, 64))
    audit = MatmulAudit(4096)
    with fastrlhf.lazy_logits(model):
        model(ids)  # the first call looks at the head
        logits = model(ids).logits
        with audit:
            logits.log_softmax(-1).gather(-1, ids[..., None]).sum().backward()
    assert audit.largest < 8 * 64 * 4096 / 7


def test_a_loop_that_scales_each_row_in_its_own_way(model) -> None:
    temperatures = (0.5, 1.0, 2.0)
    plain = [
        (row / t).logsumexp(-1) for row, t in zip(model(ids()).logits, temperatures, strict=True)
    ]
    audit = MatmulAudit(VOCAB)
    with fastrlhf.lazy_logits(model), torch.no_grad():
        model(ids())  # the first call looks at the head
        logits = model(ids()).logits
        with audit:
            found = [(row / t).logsumexp(-1) for row, t in zip(logits, temperatures, strict=True)]
    torch.testing.assert_close(torch.stack(found), torch.stack(plain))
    whole = 2 * SEQUENCES * TOKENS * VOCAB * model.config.hidden_size
    assert audit.operations <= 1.7 * whole  # all rows at the first scale, and two alone


def test_gradients_of_what_is_asked_together(model) -> None:
    """Of one pass: log-probs, log-sum-exp and entropy, each with a weight of its own."""

    def gradient(model: nn.Module, *, lazy: bool) -> Tensor:
        model.zero_grad()
        with fastrlhf.lazy_logits(model) if lazy else contextlib.nullcontext():
            z = model(ids()).logits
            log_p, weights = z.log_softmax(-1), torch.arange(TOKENS)
            picked, lse = log_p.gather(-1, ids()[..., None])[..., 0], z.logsumexp(-1)
            parts = picked, lse, -(z.softmax(-1) * log_p).sum(-1)
            sum((n + 1) * (weights**n * part).sum() for n, part in enumerate(parts)).backward()
        return model.lm_head.weight.grad

    exact = gradient(copy.deepcopy(model).double(), lazy=False)
    plain, ours = (gradient(model, lazy=lazy).clone() for lazy in (False, True))
    assert [use.plan for use in fastrlhf.lazy_report().fused] == ["4G", "0G", "0G"]
    assert (ours - exact).norm() <= 3 * (plain - exact).norm()


@pytest.mark.parametrize(
    "ask",
    [
        lambda z: (0.3 * (z.tanh() * 2)).logsumexp(-1),
        lambda z: (-2 * z.softmax(-1) * z.log_softmax(-1)).sum(-1),
        lambda z: (z.log_softmax(-1) * 0.5).gather(-1, ids()[..., None]),
        lambda z: (z.log_softmax(-1) / -4).sum(-1),
        lambda z: z.softmax(-1).mul(3).gather(-1, ids()[..., None]),
    ],
)
def test_factors_before_and_after(model, ask) -> None:
    exact, plain = ask(copy.deepcopy(model).double()(ids()).logits), ask(model(ids()).logits)
    with fastrlhf.lazy_logits(model):
        found = ask(model(ids()).logits)
    assert fastrlhf.lazy_report().built == ()
    eps = torch.finfo(torch.float32).eps
    assert (found - exact).abs().max() <= 3 * (plain - exact).abs().max() + eps * exact.abs().max()


@pytest.mark.parametrize(
    "ask",
    [
        lambda z: (z * -1.5).argmax(-1),
        lambda z: (z * -1.5).log_softmax(-1).gather(-1, ids()[..., None]),
        lambda z: (z.softmax(-1) * (z / 2)).sum(-1),
        lambda z: (z.softmax(-1) * (z[:, :, :] * 3).log_softmax(-1)).sum(-1),
    ],
)
def test_what_looks_like_something_known(model, ask) -> None:
    plain = ask(model(ids()).logits)
    with fastrlhf.lazy_logits(model):
        torch.testing.assert_close(ask(model(ids()).logits), plain)


def test_logits_of_autocast_that_are_asked_for_outside(model) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(ids()).logits
        with fastrlhf.lazy_logits(model):
            lazy = model(ids()).logits
    assert lazy.dtype is plain.dtype is torch.bfloat16
    assert torch.equal(lazy.sigmoid(), plain.sigmoid())


@pytest.mark.parametrize(
    "ask",
    [
        lambda z: (z.softmax(-1).detach() * z.log_softmax(-1)).sum(-1),
        lambda z: (z[:, :-1].softmax(-1) * z[:, 1:].log_softmax(-1)).sum(-1),
    ],
)
def test_factors_that_are_not_of_one_distribution(model, ask) -> None:
    def outcome() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        value = ask(model(ids()).logits)
        value.square().sum().backward()
        return value.detach(), model.lm_head.weight.grad.clone()

    plain = outcome()
    with fastrlhf.lazy_logits(model):
        torch.testing.assert_close(outcome(), plain)
