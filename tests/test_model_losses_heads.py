"""Losses of models whose heads and forwards are special: heads of other kinds, own modules, virtual
tokens, divergences of two models; how many matmuls they take.
"""

import warnings

import pytest
import torch
from support import model_loss_problems
from support.matmuls import MatmulAudit
from support.model_loss_problems import (
    B_T1,
    LOSSES,
    SEQUENCES,
    TOKENS,
    Plain,
    assert_same,
    gradients,
    packed,
    policy,
    sides,
)
from support.tiny_models import VOCAB, batch, make, with_lora
from torch import Tensor, nn

import fastrlhf

peft = pytest.importorskip("peft", reason="needs peft")

HEADS = {
    "frozen": lambda: with_lora(make("Gemma2").double(), "q_proj"),
    "adapted": lambda: with_lora(make("Llama").double(), "q_proj", "lm_head"),
    "adapted and scaled": lambda: with_lora(make("Cohere").double(), "q_proj", "lm_head"),
    "DoRA": lambda: with_lora(make("Llama").double(), "q_proj", "lm_head", use_dora=True),
    "trained beside": lambda: with_lora(
        make("Llama").double(), "q_proj", modules_to_save=["lm_head"]
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_other_kinds(head, loss) -> None:
    model = HEADS[head]()
    plain, ours = LOSSES[loss]
    assert_same(ours(model, batch(), chunk_size=4)[0], plain(Plain(model, batch())), model)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_head_that_rules_words_out_and_caps_the_rest(loss) -> None:
    """What the linear operations do not know: the logits of the head's module are scored."""
    model = make("Gemma2").double()
    offset = torch.linspace(-2, 2, VOCAB, dtype=torch.float64)
    own = model.forward

    def forward(input_ids=None, attention_mask=None, use_cache=None):
        output = own(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = output.logits + offset
        return output

    model.forward = forward
    plain, ours = LOSSES[loss]
    assert_same(ours(model, batch(), chunk_size=4)[0], plain(Plain(model, batch())), model)


@pytest.mark.parametrize("loss", LOSSES)
def test_virtual_tokens_are_no_tokens(loss) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of renamed properties
        model = peft.get_peft_model(make("Llama"), config).double()

    class Cut(nn.Module):
        def forward(self, **inputs):
            output = model(**inputs)
            output.logits = output.logits[:, 3:]
            return output

    plain, ours = LOSSES[loss]
    assert_same(ours(model, batch())[0], plain(Plain(Cut(), batch())), model)


POLICIES = {
    "gmpo": {"surrogate": "gmpo", "ratio_level": "sequence"},
    "vespo": {"surrogate": "vespo", "ratio_level": "product"},
    "dppo": {"surrogate": "dppo_tv", "kl_reference": "old", "kl_coef": 0.1, "kl_estimator": "k2"},
    "weighed": {"kl_coef": 0.1, "kl_bias_correction": True, "off_policy_mask_threshold": 0.1},
    "not reduced": {"reduction": "none"},
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("head", ["frozen", "trained", "DoRA"])
def test_policy_losses_of_every_kind(head, name) -> None:
    model = make("Llama").double() if head == "trained" else HEADS[head]()
    options, s = dict(POLICIES[name]), dict(sides())
    plain = Plain(model, batch())
    s["old"] = (plain.logprob.detach() + 0.3 * torch.randn(B_T1)).clamp(max=-1e-3)
    if options.get("kl_reference") == "old":
        s["ref"] = None
    if name == "weighed":
        options["kl_weights"] = torch.rand(B_T1).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_loss_problems, "sides", lambda: s)
        found, expected = policy(model, batch(), **options)[0], plain.policy(**options)
    assert found.shape == expected.shape
    weights = torch.rand(found.shape).double()
    assert_same((found * weights).sum(), (expected * weights).sum(), model)


def test_an_own_module_sees_groups_together_and_in_order() -> None:
    model, inputs = HEADS["DoRA"](), batch()
    seen: list[Tensor] = []

    def loss_fn(stats: fastrlhf.ChunkStats, position: Tensor) -> Tensor:
        seen.append(torch.stack((stats.groups, position)))
        return -stats.logprob.sum()

    groups = torch.tensor([7, 2, 7])[:, None].expand(SEQUENCES, TOKENS - 1)
    positions = torch.arange(SEQUENCES * (TOKENS - 1)).view(SEQUENCES, -1)
    fastrlhf.model_linear_loss(
        loss_fn, model, inputs["input_ids"], inputs["attention_mask"], positions,
        mask=inputs["mask"], groups=groups,
    )  # fmt: skip
    found = seen[-1]
    scored = inputs["mask"][:, 1:]
    order = torch.tensor([1, 0, 2])  # group 2, then both sequences of group 7
    expected = [torch.stack((groups[i], positions[i]))[:, scored[i]] for i in order]
    assert torch.equal(found, torch.cat(expected, dim=1))


@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
def test_where_nothing_is_scored_by_an_own_module_its_gradient_is_zero(loss) -> None:
    """And not missing, for which DistributedDataParallel would wait."""
    model, inputs = HEADS["DoRA"](), batch()
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    if loss == "divergence":
        made = fastrlhf.model_kl_divergence(model, make("GPT2").double(), **inputs).sum()
    else:
        made = LOSSES[loss][1](model, inputs)[0]
    found = gradients(model, made)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(g.any() for g in found.values())


DIVERGENCES = {
    "reverse": {"direction": "reverse"},
    "forward": {"direction": "forward", "temperature": 0.7},
    "jsd": {"direction": "jsd", "beta": 0.3},
}
COUPLES = {
    "wider": (lambda: make("Llama"), lambda: make("Llama", hidden_size=48, head_dim=12)),
    "capped": (lambda: make("Llama"), lambda: make("Gemma2")),
    "frozen": (lambda: with_lora(make("Gemma2"), "q_proj"), lambda: make("Cohere")),
    "adapted": (lambda: with_lora(make("Llama"), "lm_head"), lambda: make("Phi")),
    "DoRA": (lambda: with_lora(make("Llama"), "lm_head", use_dora=True), lambda: make("GPT2")),
    "of DoRA": (lambda: make("GPT2"), lambda: with_lora(make("Llama"), "lm_head", use_dora=True)),
}


@pytest.mark.parametrize("weighed", ["alike", "by token"])
@pytest.mark.parametrize("couple", COUPLES)
@pytest.mark.parametrize("measure", DIVERGENCES)
def test_a_divergence_is_that_of_both_models_logits(measure, couple, weighed) -> None:
    model, teacher = (create().double() for create in COUPLES[couple])
    inputs, options = batch(), DIVERGENCES[measure]
    values = fastrlhf.model_kl_divergence(model, teacher, **inputs, chunk_size=4, **options)
    with torch.no_grad():
        theirs = Plain(teacher, inputs).logits
    plain = fastrlhf.kl_divergence(
        Plain(model, inputs).logits, theirs, mask=inputs["mask"][:, 1:], **options
    )
    weights = torch.ones_like(plain)
    if weighed == "by token":
        weights = sides()["of_tokens"]
    torch.testing.assert_close(values, plain)
    assert_same((values * weights).sum(), (plain * weights).sum(), model)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("couple", COUPLES)
def test_a_divergence_brings_the_models_own_entropy(couple) -> None:
    model, teacher = (create().double() for create in COUPLES[couple])
    values, entropies = fastrlhf.model_kl_divergence(model, teacher, **batch(), entropy=True)
    expected = Plain(model, batch()).entropy.detach()
    scored = batch()["mask"][:, 1:] != 0
    torch.testing.assert_close(entropies, torch.where(scored, expected, 0.0))
    assert not entropies.requires_grad and values.requires_grad


class Wide:
    """A vocabulary that is large beside the rest of a model."""

    vocab, width = 1000, 16

    def __init__(self, trained: str):
        size = {"vocab_size": self.vocab, "hidden_size": self.width, "head_dim": 4}
        self.model, self.teacher = make("Llama", **size), make("Llama", **size)
        if trained == "adapter":
            self.model = with_lora(self.model, "q_proj")
        self.recorded = trained != "nothing"

    def audit(self, loss: str, mask: Tensor | None = None) -> MatmulAudit:
        """Count the matmuls of forward and backward."""
        inputs = batch()
        inputs["mask"] = inputs["mask"] if mask is None else mask
        with MatmulAudit() as audit, torch.set_grad_enabled(self.recorded):
            if loss == "divergence":
                made = fastrlhf.model_kl_divergence(
                    self.model, self.teacher, **inputs, chunk_size=16
                ).sum()
            else:
                made = LOSSES[loss][1](self.model, inputs, chunk_size=16)[0]
            if self.recorded:
                made.backward()
        return audit


@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
@pytest.mark.parametrize("trained", ["head", "adapter", "nothing"])
def test_as_many_matmuls_as_stated_and_no_logits(loss, trained) -> None:
    wide = Wide(trained)
    wide.audit(loss)  # which compares the head with its weight
    audit, nothing = wide.audit(loss), wide.audit(loss, torch.zeros(SEQUENCES, TOKENS))
    assert audit.largest < SEQUENCES * TOKENS * wide.vocab
    unit = 2 * int(batch()["mask"][:, 1:].sum()) * wide.vocab * wide.width
    want = {"head": 3, "adapter": 2, "nothing": 1}[trained]
    if loss == "gspo":  # the ratios of the others are clipped, and have no gradient
        scored = batch()["mask"][:, 1:].sum(1)
        want = 1 + (want - 1) * float(scored[1] / scored.sum())
    want += loss == "divergence"  # the teacher's logits
    want += loss == "aot" and trained == "head"  # sorts over the batch: statistics, then a loss
    # Where no token is scored, all but the heads is left.
    assert (audit.operations - nothing.operations) / unit == pytest.approx(want, rel=1e-6)


def test_keywords_that_are_none_are_not_given() -> None:
    model, inputs = make("GPT2").double(), batch()
    padded = {name: torch.cat((x.new_zeros(SEQUENCES, 3), x), 1) for name, x in inputs.items()}
    plain, _ = fastrlhf.sft_loss(model, **inputs)
    found, _ = fastrlhf.sft_loss(model, **padded, position_ids=None, past_key_values=None)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    hidden, _ = fastrlhf.head_inputs(model, ids, mask, position_ids=None)
    expected, _ = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(hidden[0, 3:], expected[0])


def test_a_forward_that_hides_what_it_takes_has_positions_all_the_same(monkeypatch) -> None:
    model, inputs = make("GPT2").double(), batch()
    plain, _ = fastrlhf.sft_loss(model, **inputs)
    own = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kw: own(self, *args, **kw))
    padded = {name: torch.cat((x.new_zeros(SEQUENCES, 3), x), 1) for name, x in inputs.items()}
    torch.testing.assert_close(fastrlhf.sft_loss(model, **padded)[0], plain, rtol=1e-12, atol=0)
    rows, _ = packed(inputs)
    torch.testing.assert_close(fastrlhf.sft_loss(model, **rows)[0], plain, rtol=1e-5, atol=0)
