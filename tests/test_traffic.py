"""Bytes moved by the kernels, against the floors: counted under the interpreter, exactly."""

import pytest
import torch

import fastrlhf

pytest.importorskip("triton", reason="needs triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter counts bytes on machines without a GPU", allow_module_level=True)

from support.kept import support_of
from support.traffic import counted_traffic

VOCABS = [1000, 4096, 20000]


def run(logits, targets, monkeypatch, **options):
    """Traffic of the forward and of the backward of token_stats on a leaf; and the gradient."""
    with counted_traffic(monkeypatch) as forward:
        stats = fastrlhf.token_stats(logits, targets, impl="triton", **options)
    loss = stats.logprob.sum() + (stats.entropy.sum() if options.get("entropy") else 0)
    with counted_traffic(monkeypatch) as backward:
        (gradient,) = torch.autograd.grad(loss, logits)
    return forward, backward, gradient


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k1_reads_the_logits_once_and_k2_reads_and_writes_them_once(
    vocab, entropy, dtype, monkeypatch
) -> None:
    logits = torch.randn(4, vocab, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (4,))
    forward, backward, gradient = run(logits, targets, monkeypatch, entropy=entropy)
    # Each row's target is looked up once more: 4 logits in all.
    assert forward.loaded(logits) == logits.nbytes + 4 * dtype.itemsize
    assert forward.stored(logits) == 0
    assert backward.loaded(logits) == logits.nbytes
    assert backward.stored(gradient) == logits.nbytes
    assert backward.loaded(gradient) == 0
    # Everything else, targets, partial sums and statistics, is small beside the logits.
    assert forward.loaded() + forward.stored() <= 1.01 * logits.nbytes + 4 * 200
    assert backward.loaded() + backward.stored() <= 2.01 * logits.nbytes + 4 * 300


def test_k2_in_place_reads_and_writes_the_logits_themselves_once(monkeypatch) -> None:
    leaf = torch.randn(3, 5000, requires_grad=True)
    logits = leaf * 1.0
    targets = torch.randint(5000, (3,))
    logprobs = fastrlhf.token_logprobs(logits, targets, impl="triton", inplace_backward=True)
    with counted_traffic(monkeypatch) as backward:
        logprobs.sum().backward()
    assert backward.loaded(logits) == backward.stored(logits) == logits.nbytes


def test_ignored_rows_are_not_read_and_only_written(monkeypatch) -> None:
    logits = torch.randn(6, 1000, requires_grad=True)
    targets = torch.tensor([3, -100, -100, 5, -100, 999])
    forward, backward, gradient = run(logits, targets, monkeypatch)
    row = 1000 * 4
    assert forward.loaded(logits) == 3 * row + 3 * 4
    assert backward.loaded(logits) == 3 * row
    assert backward.stored(gradient) == 6 * row


def test_rows_without_a_gradient_are_not_read_backward(monkeypatch) -> None:
    logits = torch.randn(4, 1000, requires_grad=True)
    logprobs = fastrlhf.token_logprobs(logits, torch.randint(1000, (4,)), impl="triton")
    with counted_traffic(monkeypatch) as backward:
        (logprobs * torch.tensor([1.0, 0.0, 0.0, 2.0])).sum().backward()
    assert backward.loaded(logits) == 2 * 1000 * 4


def test_k2_with_a_slope_of_the_lse_reads_and_writes_as_much(monkeypatch) -> None:
    vocab = 5000
    logits, targets = torch.randn(5, vocab), torch.tensor([3, 4, -100, 5, 4999])
    ops, last = torch.ops.fastrlhf, (None, 1.0, None, 1.0)
    logprob, entropy, _, *rest = ops.token_stats(
        logits, targets, *last, -100, True, False, "triton"
    )
    g, h, l = (torch.tensor(x) for x in ([1.0, 0, 1, 0, 0], [0.0, 1, 1, 0, 0], [0.0, 0, 1, 1, 0]))
    for slope in (h, None):
        with counted_traffic(monkeypatch) as backward:
            gradient = ops.token_stats_backward(
                logits, targets, logprob, entropy, *rest, g, slope, *last, "triton", l
            )
        # Neither an ignored row nor one without a gradient.
        read = 3 if slope is not None else 2
        assert backward.loaded(logits) == read * vocab * 4
        assert backward.stored(gradient) == logits.nbytes
        assert backward.loaded() - backward.loaded(logits) <= 5 * 300


def test_launches_do_not_depend_on_the_number_of_rows(monkeypatch) -> None:
    for rows in (1, 7):
        logits = torch.randn(rows, 300, requires_grad=True)
        forward, backward, _ = run(logits, torch.randint(300, (rows,)), monkeypatch)
        assert sum(forward.launches.values()) == 2
        assert sum(backward.launches.values()) == 1


def test_the_audit_notices_a_second_read(monkeypatch) -> None:
    logits = torch.randn(2, 1000)
    targets = torch.randint(1000, (2,))
    with counted_traffic(monkeypatch) as twice:
        fastrlhf.token_logprobs(logits, targets, impl="triton")
        fastrlhf.token_logprobs(logits, targets, impl="triton")
    assert twice.loaded(logits) == 2 * (logits.nbytes + 2 * 4)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_preference_tail_is_one_launch_forward_and_one_backward(per_token, monkeypatch) -> None:
    sequences, tokens = 6, 40
    logprobs = torch.randn(sequences, tokens, requires_grad=True)
    mask = torch.rand(sequences, tokens) > 0.3
    index = torch.arange(3), torch.arange(3, 6)
    ref = torch.randn(sequences, tokens) if per_token else torch.randn(sequences)
    with counted_traffic(monkeypatch) as forward:
        losses, _ = fastrlhf.dpo_loss(logprobs, ref, *index, mask=mask, impl="triton")
    with counted_traffic(monkeypatch) as backward:
        losses.mean().backward()
    assert sum(forward.launches.values()) == sum(backward.launches.values()) == 1
    assert backward.stored(logprobs.grad) == logprobs.nbytes


@pytest.mark.parametrize("ref_per_token", [False, True])
def test_packed_preferences_move_the_bytes_of_their_tokens(ref_per_token, monkeypatch) -> None:
    lengths = torch.tensor([40, 3, 0, 1100, 7, 90])
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    logprobs = torch.randn(1240, requires_grad=True)
    mask = torch.rand(1240) > 0.3
    index = torch.arange(3), torch.arange(3, 6)
    ref = torch.randn(1240) if ref_per_token else torch.randn(6)
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "impl": "triton"}
    with counted_traffic(monkeypatch) as forward:
        losses, _ = fastrlhf.dpo_loss(logprobs, ref, *index, **options)
    with counted_traffic(monkeypatch) as backward:
        losses.mean().backward()
    assert sum(forward.launches.values()) == sum(backward.launches.values()) == 1
    # A pair reads both of its sequences; who writes a reward stands in for both.
    assert forward.loaded(logprobs) == 3 * 4 * int(mask.sum())
    assert forward.loaded(mask) == 3 * mask.nbytes
    assert backward.loaded(mask) == mask.nbytes
    assert backward.stored(logprobs.grad) == logprobs.nbytes


def policy_step(logits, monkeypatch, *, advantages=None, mask=None, shift=0.0, **options):
    """Traffic of logits_policy_loss, forward and backward together, and the gradient."""
    batch, tokens, vocab = logits.shape
    targets = torch.randint(vocab, (batch, tokens))
    old = fastrlhf.token_logprobs(logits.detach(), targets) + shift
    ones = torch.ones(batch, tokens)
    mask, advantages = (ones if x is None else x for x in (mask, advantages))
    with counted_traffic(monkeypatch) as traffic:
        loss, _ = fastrlhf.logits_policy_loss(
            logits, targets, old, advantages, mask, impl="triton", **options
        )
        (gradient,) = torch.autograd.grad(loss, logits)
    return traffic, gradient


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo", "plain", "dppo_tv", "dppo_kl"])
def test_k3_reads_the_logits_twice_and_writes_the_gradient_once_in_one_launch(
    vocab, dtype, surrogate, monkeypatch
) -> None:
    logits = torch.randn(1, 3, vocab, dtype=dtype, requires_grad=True)
    traffic, gradient = policy_step(logits, monkeypatch, surrogate=surrogate, entropy_coef=0.1)
    assert traffic.launches.total() == 1
    # Each row's target is looked up once more: 3 logits in all.
    assert traffic.loaded(logits) == 2 * logits.nbytes + 3 * dtype.itemsize
    assert traffic.stored(gradient) == logits.nbytes
    assert traffic.stored(logits) == traffic.loaded(gradient) == 0
    assert traffic.loaded() + traffic.stored() <= 3 * logits.nbytes + 3 * 100


def test_k3_in_place_moves_as_much_and_allocates_nothing(monkeypatch) -> None:
    leaf = torch.randn(1, 3, 5000, requires_grad=True)
    logits = leaf * 1.0
    traffic, gradient = policy_step(logits, monkeypatch, inplace_backward=True)
    assert gradient.data_ptr() == logits.data_ptr()
    assert traffic.launches.total() == 1
    assert traffic.loaded(logits) == 2 * logits.nbytes + 3 * 4
    assert traffic.stored(logits) == logits.nbytes


def test_k3_does_not_read_tokens_that_change_nothing(monkeypatch) -> None:
    row = 1000 * 4
    logits = torch.randn(1, 6, 1000, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    advantages = torch.tensor([[1.0, 1.0, 0.0, -1.0, 0.0, 0.0]])
    traffic, gradient = policy_step(logits, monkeypatch, mask=mask, advantages=advantages)
    assert traffic.loaded(logits) == 2 * (2 * row + 4)
    assert traffic.stored(gradient) == 6 * row
    # A reference or an entropy is a reason to look at the others of the mask.
    for options in ({"ref_logprobs": torch.zeros(1, 6)}, {"entropy": True}):
        traffic, _ = policy_step(logits, monkeypatch, mask=mask, advantages=advantages, **options)
        # Those without a slope are read for their log-prob alone.
        assert traffic.loaded(logits) == (2 + 4) * row + 4 * 4


def test_k3_reads_a_clipped_token_once(monkeypatch) -> None:
    logits = torch.randn(1, 4, 1000, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    shift = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])  # ratios e, e, 1/e, 1/e
    traffic, gradient = policy_step(logits, monkeypatch, advantages=advantages, shift=shift)
    assert traffic.loaded(logits) == (4 + 2) * 1000 * 4 + 4 * 4
    assert gradient.any(-1).tolist() == [[False, True, True, False]]


def test_a_ratio_of_sequences_takes_k1_and_k2(monkeypatch) -> None:
    logits = torch.randn(2, 2, 1000, requires_grad=True)
    traffic, gradient = policy_step(logits, monkeypatch, ratio_level="sequence")
    assert traffic.launches.total() == 3
    assert traffic.loaded(logits) == 2 * logits.nbytes + 4 * 4
    assert traffic.stored(gradient) == logits.nbytes


def test_the_scan_reads_and_writes_each_token_once_in_one_launch(monkeypatch) -> None:
    rewards, values = torch.randn(2, 70), torch.randn(2, 70)
    mask = torch.ones(2, 70, dtype=torch.bool)
    with counted_traffic(monkeypatch) as traffic:
        advantages, returns = fastrlhf.gae(rewards, values, mask, impl="triton")
    assert traffic.launches.total() == 1
    assert traffic.loaded(rewards) == rewards.nbytes
    # Each value also serves the token before it, within a block of the scan.
    assert traffic.loaded(values) <= 2 * values.nbytes
    assert traffic.stored(advantages) == traffic.stored(returns) == rewards.nbytes


def test_the_packed_scan_reads_and_writes_each_token_once_in_one_launch(monkeypatch) -> None:
    rewards, values, mask = torch.randn(140), torch.randn(140), torch.ones(140, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 70, 70, 103, 140])
    with counted_traffic(monkeypatch) as traffic:
        advantages, returns = fastrlhf.gae(
            rewards, values, mask, cu_seqlens=cu_seqlens, impl="triton"
        )
    assert traffic.launches.total() == 1
    assert traffic.loaded(rewards) == rewards.nbytes
    assert traffic.loaded(values) <= 2 * values.nbytes
    assert traffic.stored(advantages) == traffic.stored(returns) == rewards.nbytes


def test_numbers_of_each_sequence_are_read_once_in_the_same_launch(monkeypatch) -> None:
    rewards, values, mask = torch.randn(2, 70), torch.randn(2, 70), torch.ones(2, 70)
    lam, last = torch.rand(2), torch.randn(2)
    with counted_traffic(monkeypatch) as traffic:
        fastrlhf.gae(rewards, values, mask, lam=lam, last_values=last, impl="triton")
    assert traffic.launches.total() == 1
    assert traffic.loaded(lam) == traffic.loaded(last) == lam.nbytes
    assert traffic.loaded(rewards) == rewards.nbytes


def kept_problem(dtype=torch.bfloat16):
    """Tokens of which two keep one id, one is ignored; and how many ids there is a choice of."""
    hidden = torch.randn(5, 300).to(dtype).requires_grad_()
    weight = torch.randn(50, 300).to(dtype).requires_grad_()
    targets = torch.tensor([7, 3, -100, 49, 0])
    kept = [[7], [1, 3, 4, 9], [-5, 99], [49], [8, 0]]
    return hidden, weight, targets, support_of([torch.tensor(x) for x in kept]), 4 + 2


def test_rows_of_kept_ids_are_read_once_and_no_others(monkeypatch) -> None:
    hidden, weight, targets, support, choices = kept_problem()
    row = 300 * 2
    with counted_traffic(monkeypatch) as forward:
        logprobs = fastrlhf.linear_token_logprobs(
            hidden, weight, targets, support=support, impl="triton"
        )
    # A token that keeps one id is certain of it: neither is read.
    assert forward.loaded(weight) == forward.loaded(hidden) == choices * row
    with counted_traffic(monkeypatch) as backward:
        gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert backward.loaded(weight) == backward.loaded(hidden) == choices * row
    assert [backward.stored(x) for x in gradients] == [x.nbytes for x in gradients]
    small = 80 * 16 + 16 * 51  # of numbers for each id and token, and bounds for each row
    assert backward.loaded() <= 2 * choices * row + small + 12 * 50 * 2
    # The lse is that of the only id, which is then read.
    with counted_traffic(monkeypatch) as forward:
        stats = fastrlhf.linear_token_stats(hidden, weight, targets, support=support, impl="triton")
    assert forward.loaded(weight) == (choices + 2) * row
    with counted_traffic(monkeypatch) as backward:
        (stats.logprob * torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0])).sum().backward()
    # Of the tokens with a choice, one has a gradient.
    assert backward.loaded(weight) == backward.loaded(hidden) == 2 * row


def test_kept_logits_are_written_into_zeros(monkeypatch) -> None:
    hidden, weight, targets, support, _ = kept_problem(torch.float32)
    logits = (hidden @ weight.T).detach().requires_grad_()
    with counted_traffic(monkeypatch) as traffic:
        logprobs = fastrlhf.token_logprobs(logits, targets, support=support, impl="triton")
        (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    # Taken and put by PyTorch, a number for each kept id.
    assert traffic.loaded(logits) == traffic.stored(gradient) == 0
    assert int((gradient != 0).sum()) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1001, 20000])
def test_distillation_from_some_words_reads_the_logits_once_each_way(
    dtype, vocab, monkeypatch
) -> None:
    logits = torch.randn(4, vocab, dtype=dtype, requires_grad=True)
    words = torch.randn(4, vocab).log_softmax(-1).topk(8)
    mask = torch.tensor([1, 1, 0, 1])
    with counted_traffic(monkeypatch) as forward:
        values = fastrlhf.topk_kl_divergence(logits, *words, mask=mask, impl="triton")
    with counted_traffic(monkeypatch) as backward:
        (gradient,) = torch.autograd.grad(values.sum(), logits)
    read = 3 * vocab * dtype.itemsize
    assert forward.loaded(logits) == backward.loaded(logits) == read
    assert forward.stored(logits) == backward.loaded(gradient) == 0
    assert backward.stored(gradient) == gradient.nbytes
    # All else is of the size of the words.
    assert forward.loaded() + forward.stored() <= 1.01 * read + 4 * 1000
    assert backward.loaded() + backward.stored() <= read + gradient.nbytes + 4 * 1000
