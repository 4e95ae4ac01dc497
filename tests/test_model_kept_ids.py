"""Kept ids, and trees of sequences, of models, against the models' own logits."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from support.kept import random_support, support_of
from support.matmuls import MatmulAudit
from support.tiny_models import VOCAB, batch, make, with_lora
from torch import Tensor, nn

import fastrlhf
from fastrlhf import reference

pytest.importorskip("transformers", reason="needs transformers")
NAMES = ("is_top1", "mean_logit", "log_sum_sq_probs")


def parameters(model: nn.Module) -> list[Tensor]:
    return [x for x in model.parameters() if x.requires_grad]


def assert_same_gradients(found: Tensor, expected: Tensor, model: nn.Module) -> None:
    of_all = parameters(model)
    ours = torch.autograd.grad(found, of_all, allow_unused=True)
    theirs = torch.autograd.grad(expected, of_all, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert (a is None or not a.any()) == (b is None or not b.any())


def scored(model: nn.Module, **options):
    """A batch with padding, a support of its tokens after the first, and their statistics by the
    model's own logits.
    """
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs.pop("mask")
    targets = torch.where(mask[:, 1:] != 0, ids[:, 1:], -100)
    support = random_support(targets, VOCAB)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    defined = reference.kept_token_stats(
        logits, targets, support, entropy=True, with_stats=NAMES, **options
    )
    return inputs, mask, support, defined


@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "Gemma2", "Cohere", "Granite", "OPT"])
def test_statistics_of_models_that_scale_or_cap(name) -> None:
    model = make(name)
    inputs, mask, support, defined = scored(model, temperature=0.8)
    stats = fastrlhf.model_token_stats(
        model, **inputs, mask=mask, support=support, entropy=True, with_stats=NAMES,
        temperature=0.8,
    )  # fmt: skip
    for a, b in zip(stats, defined, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_same_gradients(
        (stats.logprob + 0.3 * stats.entropy).sum(),
        (defined.logprob + 0.3 * defined.entropy).sum(), model,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_the_head(kind) -> None:
    """A low-rank one is another block of the weight; of another one the module makes the logits."""
    model = make("Llama")
    model = with_lora(model, "lm_head", "q_proj", use_dora=kind == "dora")
    inputs, mask, support, defined = scored(model)
    stats = fastrlhf.model_token_stats(
        model, **inputs, mask=mask, support=support, entropy=True, with_stats=NAMES
    )
    for a, b in zip(stats, defined, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_same_gradients(
        (stats.logprob + 0.3 * stats.entropy).sum(),
        (defined.logprob + 0.3 * defined.entropy).sum(), model,
    )  # fmt: skip


def test_losses_over_kept_ids() -> None:
    model = make("Llama")
    inputs, mask, support, _ = scored(model)
    live = mask[:, 1:] != 0
    old, gain = torch.randn(live.shape) - 5, torch.tensor([0.0, 1.0, -1.0])
    ref, pairs = torch.randn(3) - 25, (torch.tensor([0, 1]), torch.tensor([2, 2]))
    weight = torch.randn(live.shape)
    own = {"mask": mask, "support": support}
    run = {
        "policy": lambda: fastrlhf.model_policy_loss(
            model, *inputs.values(), old, gain, entropy_coef=0.1, **own
        )[0],
        "dpo": lambda: fastrlhf.model_dpo_loss(model, *inputs.values(), ref, *pairs, **own)[
            0
        ].mean(),
        "cross-entropy": lambda: fastrlhf.sft_loss(model, *inputs.values(), **own)[0],
        "own": lambda: fastrlhf.model_linear_loss(
            lambda stats, w: (w * stats.logprob).sum(), model, *inputs.values(), weight, **own
        )[0],
    }
    expected = {
        "policy": lambda s: fastrlhf.policy_loss(
            s.logprob, old, gain, live, entropy=s.entropy, entropy_coef=0.1
        )[0],
        "dpo": lambda s: fastrlhf.dpo_loss(s.logprob, ref, *pairs, mask=live)[0].mean(),
        "cross-entropy": lambda s: -s.logprob.sum() / live.sum(),
        "own": lambda s: (weight * s.logprob).sum(),
    }
    fastrlhf.model_token_stats(model, *inputs.values(), mask=mask)  # looks at the model's logits
    for name, loss in run.items():
        with MatmulAudit(VOCAB) as audit:
            found = loss()
        assert audit.operations <= 2 * 2 * 4 * VOCAB * 32, name  # of the look at a few tokens
        exact = expected[name](scored_again(model, inputs, mask, support))
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        assert_same_gradients(found, exact, model)


def scored_again(model, inputs, mask, support):
    targets = torch.where(mask[:, 1:] != 0, inputs["input_ids"][:, 1:], -100)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return reference.kept_token_stats(logits, targets, support, entropy=True)


def test_packed_sequences_keep_ids_too() -> None:
    model, ids = make("Llama"), torch.randint(1, VOCAB, (1, 12))
    borders = torch.tensor([0, 5, 6, 12])
    apart = [ids[:, a:b] for a, b in pairwise(borders)]
    targets = ids[:, 1:].clone()
    targets[0, [4, 5]] = -100  # the first tokens of sequences
    support = random_support(targets, VOCAB)
    stats = fastrlhf.model_token_stats(
        model, ids, cu_seqlens=borders, support=support, entropy=True
    )
    logits = torch.cat([model(x).logits for x in apart], dim=1)[:, :-1].float()
    defined = reference.kept_token_stats(logits, targets, support, entropy=True)
    torch.testing.assert_close(tuple(stats)[:3], tuple(defined)[:3], rtol=1e-4, atol=1e-4)


class Tree:
    """A prompt of three tokens and three answers, two of which part after their first token."""

    parents = torch.tensor([-1, 0, 1, 2, 3, 4, 3, 6, 2, 8])
    paths = ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 6, 7), (0, 1, 2, 8, 9))

    def __init__(self) -> None:
        self.ids = torch.randint(1, VOCAB, (1, 10))
        depth, see = torch.zeros(10, dtype=torch.int64), torch.eye(10, dtype=torch.bool)
        for i, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                depth[i], see[i] = depth[parent] + 1, see[parent] | see[i]
        self.inputs = {
            "position_ids": depth[None],
            "attention_mask": torch.where(see, 0.0, torch.finfo(torch.float32).min)[None, None],
        }
        self.rows = self.parents[None, 1:]

    def apart(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits and targets of the tree's tokens, from sequences that are written out."""
        logits, tokens = torch.zeros(9, VOCAB), self.ids[0, 1:]
        for path in self.paths:
            of_path = model(self.ids[:, list(path)]).logits[0].float()
            for place, token in enumerate(path[1:]):
                logits = logits.index_put((torch.tensor(token - 1),), of_path[place])
        return logits[None], tokens[None]


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
@pytest.mark.parametrize("with_support", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tree_is_its_sequences(name, with_support, frozen) -> None:
    model, tree = make(name, attn_implementation="eager"), Tree()
    if frozen:
        model.get_output_embeddings().weight.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(False)
    logits, targets = tree.apart(model)
    support = random_support(targets, VOCAB) if with_support else None
    stats = fastrlhf.model_token_stats(
        model, tree.ids, **tree.inputs, rows=tree.rows, support=support, entropy=True
    )
    of_all = partial(fastrlhf.token_stats, entropy=True)
    defined = of_all(logits, targets, support=support)
    torch.testing.assert_close(tuple(stats)[:3], tuple(defined)[:3], rtol=1e-4, atol=1e-4)
    weight = torch.randn(1, 9)
    assert_same_gradients(
        (weight * stats.logprob + stats.entropy).sum(),
        (weight * defined.logprob + defined.entropy).sum(), model,
    )  # fmt: skip
    loss, _ = fastrlhf.model_linear_loss(
        lambda stats, w: (w * stats.logprob + stats.entropy).sum(), model, tree.ids,
        tree.inputs["attention_mask"], weight, position_ids=tree.inputs["position_ids"],
        rows=tree.rows, support=support, entropy=True,
    )  # fmt: skip
    defined = of_all(tree.apart(model)[0], targets, support=support)
    exact = (weight * defined.logprob + defined.entropy).sum()
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-4)
    assert_same_gradients(loss, exact, model)


def test_several_trees() -> None:
    model, tree, other = make("Llama"), Tree(), Tree()
    inputs = {name: torch.cat((x, x)) for name, x in tree.inputs.items()}
    ids, rows = torch.cat((tree.ids, other.ids)), torch.cat((tree.rows, tree.rows))
    both = fastrlhf.model_token_stats(model, ids, **inputs, rows=rows).logprob
    for one, values in zip((tree, other), both, strict=True):
        logits, targets = one.apart(model)
        expected = fastrlhf.token_logprobs(logits, targets)
        torch.testing.assert_close(values[None], expected, rtol=1e-4, atol=1e-4)


def test_a_token_is_scored_where_its_parent_is_there() -> None:
    model, ids = make("Llama"), torch.randint(1, VOCAB, (2, 6))
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    rows = torch.tensor([[0, 1, 2, 3, 3], [0, 1, 1, 3, 4]])  # the last two, and the third, part
    found = fastrlhf.model_token_stats(model, ids, attention_mask, rows=rows).logprob != 0
    assert found.tolist() == [[False, False, True, True, True], [True, True, True, False, False]]


def test_a_tree_makes_the_logits_of_what_predicts_something_once() -> None:
    model, tree = make("Llama"), Tree()
    call = partial(fastrlhf.model_token_stats, model, tree.ids, **tree.inputs, rows=tree.rows)
    call()
    with torch.no_grad(), MatmulAudit(VOCAB) as audit:
        call()
    inner = len(set(Tree.parents[1:].tolist()))
    looks = audit.operations / (2 * VOCAB * 32) - inner
    assert inner == 7 and 0 <= looks <= 4  # a few tokens, to compare the head's own forward


def test_what_does_not_fit_is_named() -> None:
    model, tree = make("Llama"), Tree()
    call = partial(fastrlhf.model_token_stats, model, tree.ids)
    with pytest.raises(ValueError, match=r"^rows: expected shape \(1, 9\)"):
        call(**tree.inputs, rows=Tree.parents[None])
    with pytest.raises(ValueError, match=r"^rows: expected indices in \[0, 10\).*got 10"):
        call(**tree.inputs, rows=tree.rows + 2)
    with pytest.raises(ValueError, match=r"^rows: .*before .*got 1 for the token at 1$"):
        call(**tree.inputs, rows=torch.arange(1, 10)[None])
    kept = [token.view(1) for token in tree.ids[0, 1:]]
    kept[6] = torch.tensor([(int(kept[6]) + 1) % VOCAB])
    with pytest.raises(ValueError, match=r"^support: .* of token 6 \(as if flat\), which"):
        call(support=support_of(kept))
    kept[6] = torch.tensor([int(tree.ids[0, 7]), VOCAB])
    with pytest.raises(ValueError, match=rf"^support\[0\]: .*\[0, {VOCAB}\)"):
        call(support=support_of(kept))
    with pytest.raises(ValueError, match=r"^rows: expected None for a ratio of sequences"):
        fastrlhf.model_policy_loss(
            model, tree.ids, None, None, torch.ones(1), mask=torch.ones_like(tree.ids),
            rows=tree.rows, ratio_level="sequence",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"^rows: expected None with cu_seqlens"):
        call(cu_seqlens=torch.tensor([0, 10]), rows=tree.rows)
    with pytest.raises(ValueError, match=r"^support\[1\]: expected shape \(10,\)"):
        call(support=(tree.ids[0], torch.arange(11)))
    with pytest.raises(ValueError, match=r"^support: expected none, since a divergence is of the"):
        fastrlhf.model_kl_divergence(
            model, make("Llama"), tree.ids, support=(tree.ids[0], torch.arange(11))
        )
