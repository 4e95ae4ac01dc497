"""Lazy logits in modes, threads and checkpoints, and what comes too late, give what plain ones
give.
"""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.lazy_and_plain import (
    CLOSE,
    IDS,
    MODEL,
    VOCAB,
    assert_same_tensors,
    hidden_states,
    in_checkpoint,
    lazily_or_not,
    logprobs_of_ids,
    make_model,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastrlhf


def _of_no_grad(hidden: Tensor) -> Any:
    with torch.no_grad():
        logits = MODEL.lm_head(hidden)
    logits.requires_grad_()
    (logprobs_of_ids(logits).pow(2).sum() + logits.logsumexp(-1).sum()).backward()
    logits.cos().sum().backward()
    return logits.grad


def _in_inference_mode(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    with torch.inference_mode():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        mask, temperature = IDS > 2, torch.linspace(0.5, 1, 3, dtype=torch.float64)[:, None]
        divided = logits / temperature
        lse = logits[mask].logsumexp(-1) + divided[mask].logsumexp(-1)
        of_divided = -(divided.softmax(-1) * (logits / temperature).log_softmax(-1)).sum(-1)
        built = logits.sigmoid()
    (logprobs_of_ids(logits).sum() + logits.cos().sum()).backward()
    return entropy.clone(), built.clone(), lse.clone(), of_divided.clone()


def _chained_leaf(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    leaf = logits.detach().requires_grad_()
    logprobs_of_ids(leaf).pow(2).sum().backward()
    leaf.logsumexp(-1).sum().backward()
    leaf.grad.mul_(0.5)
    leaf.sum().backward()
    logits.backward(leaf.grad)
    return leaf.grad


def _inputs_of_backward(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    leaf = logits.detach().requires_grad_()
    logprobs_of_ids(leaf).pow(2).sum().backward(inputs=[leaf])
    leaf.cos().sum().backward(inputs=[leaf])
    torch.autograd.backward(logits, leaf.grad, inputs=[hidden, MODEL.lm_head.weight])
    return leaf.grad


def _detached_parts(hidden: Tensor) -> Any:
    logp = logprobs_of_ids(MODEL.lm_head(hidden))
    loss = (logp.detach().exp() * logp).sum()
    loss.backward()
    return loss.detach()


def _ruled_out(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    logits[..., VOCAB - 1] = -torch.inf
    loss = logprobs_of_ids(logits).sum() + logits.logsumexp(-1).sum()
    loss.backward()
    return loss.detach()


def _nan_of_padding(hidden: Tensor) -> Any:
    hidden = torch.where(torch.tensor([[True], [True], [False]]), hidden, torch.nan)
    logits, live = MODEL.lm_head(hidden), torch.tensor([[True, True, False]] * 2)
    loss = F.cross_entropy(logits.view(-1, VOCAB), IDS.masked_fill(~live, -100).view(-1))
    loss = loss + logits[live].logsumexp(-1).sum()
    loss.backward()
    return loss.detach()


def _nothing_left(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)[:0].view(-1, VOCAB)
    return logits.logsumexp(-1), logits.softmax(-1), logits.argmax(-1), MODEL.lm_head(hidden[:0])


def _all_ignored(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden).view(-1, VOCAB)
    loss = F.cross_entropy(logits, torch.full((6,), -100), reduction="sum") / 0
    loss.backward()
    return loss.detach()


def _kl_of_two_temperatures(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    sharp, flat = logits / 0.5, logits.detach() * 0.5
    loss = F.kl_div(sharp.log_softmax(-1), flat.log_softmax(-1), reduction="sum", log_target=True)
    loss.backward()
    return loss.detach()


def _two_calls(hidden: Tensor) -> Any:
    a, b = MODEL.lm_head(hidden), MODEL.lm_head(hidden * 2)
    loss = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()
    loss = loss + F.kl_div(a.log_softmax(-1), b.softmax(-1).detach(), reduction="batchmean")
    (loss + torch.cat([a, b]).sigmoid().sum()).backward()
    return loss.detach()


def _checkpointed_call(hidden: Tensor) -> Any:
    for reentrant in (False, True):
        loss = in_checkpoint(lambda x: logprobs_of_ids(MODEL.lm_head(x)).sum(), reentrant)(hidden)
        (loss + checkpoint(MODEL.lm_head, hidden, use_reentrant=reentrant).cos().sum()).backward()
    return loss.detach()


def _in_threads(hidden: Tensor) -> Any:
    found: list[Any] = [None] * 3

    def work(n: int) -> None:
        x = (hidden.detach() * (n + 1)).requires_grad_()
        logits = MODEL.lm_head(x)
        found[n] = torch.autograd.grad(logprobs_of_ids(logits).sum() + logits.cos().sum(), x)[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _ignored_then_statistics(hidden: Tensor) -> Any:
    logits, labels = MODEL.lm_head(hidden), IDS.masked_fill(IDS % 3 == 1, -100)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    found = losses, logits.logsumexp(-1), entropy
    sum(x.pow(2).sum() for x in found).backward()
    return found


def _rows_with_ignored(hidden: Tensor) -> Any:
    labels = IDS.view(3, 2).masked_fill(IDS.view(3, 2) % 3 == 1, -100)
    rows = MODEL.lm_head(hidden).view(3, 2, VOCAB)
    found = [F.cross_entropy(x, y, reduction="none") for x, y in zip(rows, labels, strict=True)]
    torch.cat(found).pow(2).sum().backward()
    return found


def _ids_written_later(hidden: Tensor) -> Any:
    logits, ids = MODEL.lm_head(hidden), IDS.clone()
    picked = logits.log_softmax(-1).gather(-1, ids[..., None]).detach()
    ids.zero_()
    lse = logits.logsumexp(-1)
    lse.pow(2).sum().backward()
    return picked, lse


def _another_lse(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden.view(3, 2, 8)[:2])
    ids = IDS[:, :2, None]
    found = (logits - logits.logsumexp(-1).T[..., None]).gather(-1, ids)
    lse = logits.logsumexp(-1, keepdim=True)
    lse.register_hook(lambda gradient: gradient * 2)
    (found + (logits - lse).gather(-1, ids)).pow(2).sum().backward()
    return found


def _given_otherwise(hidden: Tensor) -> Any:
    logits = MODEL.lm_head(hidden)
    named = logits.softmax(axis=-1).gather(-1, IDS[..., None])
    named.sum().backward()
    out, at = logits.new_empty(2, 3), IDS.clone()
    with torch.no_grad():
        torch.gather(logits, -1, IDS[..., None], out=(picked := logits.new_empty(2, 3, 1)))
        torch.max(logits, -1, out=(out, at))
        torch.softmax(logits, -1, out=(probs := logits.new_empty(2, 3, VOCAB)))
    for wrong in (lambda: logits.log_softmax(-1).sum(4), lambda: logits.select(-4, 0)):
        with pytest.raises(IndexError, match="Dimension out of range"):
            wrong()
    return named, out, at, picked, probs


def _words_ruled_out(hidden: Tensor) -> Any:
    offset = torch.zeros(VOCAB, dtype=torch.float64).index_fill(0, torch.tensor([2]), -torch.inf)
    logits = MODEL.lm_head(hidden) + offset
    never = logits.log_softmax(-1).gather(-1, torch.full((2, 3, 1), 2)).exp().detach()
    lse = logits.logsumexp(-1)
    lse.pow(2).sum().backward()
    known = logits.detach()
    entropy = (known.softmax(-1) * known.log_softmax(-1)).sum(-1)
    other = (known * 2).log_softmax(-1)
    divergence = F.kl_div(other, known.softmax(-1), reduction="none").sum(-1)
    return never, lse, entropy, divergence


@pytest.mark.parametrize(
    "program",
    [
        _of_no_grad, _in_inference_mode, _chained_leaf, _inputs_of_backward, _detached_parts,
        _ruled_out,
        _nan_of_padding, _nothing_left, _all_ignored, _kl_of_two_temperatures, _two_calls,
        _checkpointed_call, _in_threads, _ignored_then_statistics, _rows_with_ignored,
        _ids_written_later, _another_lse, _given_otherwise, _words_ruled_out,
    ],
)  # fmt: skip
def test_what_is_as_plain(program) -> None:
    def outcome(lazy: bool) -> list[Any]:
        with lazily_or_not(lazy):
            hidden = hidden_states(2, 3).requires_grad_()
            found = program(hidden)
        found = [found] if isinstance(found, Tensor) else [*found]
        return [x + 0 for x in found] + [hidden.grad, MODEL.lm_head.weight.grad]

    for a, b in zip(outcome(True), outcome(False), strict=True):
        assert_same_tensors(a, b, program.__name__)


def test_a_vocabulary_of_one_word() -> None:
    model = make_model(vocab=1)
    hidden = hidden_states(2, 3)
    plain = model.lm_head(hidden)
    with lazily_or_not(True, model):
        logits = model.lm_head(hidden)
        assert torch.allclose(logits.logsumexp(-1), plain.logsumexp(-1), **CLOSE)
        assert torch.equal(logits.log_softmax(-1).gather(-1, IDS[..., None] * 0), plain * 0)
        assert torch.equal(logits.squeeze(-1), plain.squeeze(-1))
        assert torch.equal(logits.expand(2, 3, 4), plain.expand(2, 3, 4))


def test_logits_are_used_before_the_weight_changes() -> None:
    model = make_model()
    with lazily_or_not(True, model):
        logits = model.lm_head(hidden_states(2, 3).requires_grad_())
        logprobs_of_ids(logits).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        for late in (lambda: logits.argmax(-1), lambda: logits.sigmoid()):
            with pytest.raises(RuntimeError, match="by a step of the optimizer"):
                late()


def test_enabled_once_is_enabled() -> None:
    """Twice, nested, or disabled between; and logits outlive it."""
    hidden = hidden_states(2, 3)
    plain = MODEL.lm_head(hidden)
    own = type(MODEL.lm_head)
    with lazily_or_not(True):
        fastrlhf.enable_lazy_logits(MODEL)
        with lazily_or_not(True):
            logits = MODEL.lm_head(hidden)
        assert type(MODEL.lm_head(hidden)) is not Tensor
    assert type(MODEL.lm_head) is own
    assert type(MODEL.lm_head(hidden)) is Tensor
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    assert torch.equal(logits.sigmoid(), plain.sigmoid())


def test_a_word_of_log_probs_is_not_written_into() -> None:
    """It is no view of what was not computed."""
    with lazily_or_not(True):
        for late in (lambda x: x.argmax(-1), lambda x: x.sigmoid(), lambda x: x[:, 1:].mul_(2)):
            logp = MODEL.lm_head(hidden_states(2, 3)).log_softmax(-1)
            logp[..., 2].detach().mul_(2)
            with pytest.raises(RuntimeError, match="is written into, which the other would see"):
                late(logp)
        logits = MODEL.lm_head(hidden_states(2, 3))
        logp, word = logits.log_softmax(-1), logits.log_softmax(-1)[..., 2]
        assert torch.equal(logp[..., 2], word)
        held = logp[..., 3]
        with pytest.raises(RuntimeError, match="is written into, which the other would see"):
            logp.mul_(2)
        assert torch.equal(held, logp[..., 3])
