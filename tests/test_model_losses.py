"""Losses of Hugging Face models, computed inside their forwards, against the models' own logits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from support.matmuls import MatmulAudit
from support.tiny_models import ARCHITECTURES, VOCAB, batch, make, with_lora
from torch import Tensor, nn

import fastrlhf

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")

SEQUENCES, TOKENS = 3, 9
PAIRS = {"yw_idxs": torch.tensor([0, 1]), "yl_idxs": torch.tensor([2, 2])}


def sides() -> dict[str, Tensor]:
    """What losses take besides the tokens, in fp64."""
    generator = torch.Generator().manual_seed(5)
    shape = SEQUENCES, TOKENS - 1

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "old": normal(*shape) - 5, "ref": normal(*shape) - 5, "gain": normal(SEQUENCES),
        "of_tokens": normal(*shape), "ref_sums": normal(SEQUENCES) - 25,
    }  # fmt: skip


def own_loss(stats: fastrlhf.ChunkStats, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = -(stats.logprob * weight).sum() - 0.3 * stats.entropy.square().sum()
    return loss, {"logprob": stats.logprob}


class Plain:
    """The same losses from a model's own logits."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]):
        ids, mask = inputs["input_ids"], inputs["mask"][:, 1:]
        inputs = {name: x for name, x in inputs.items() if name != "mask"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].double()
        self.logits, self.targets, self.mask = logits, ids[:, 1:], mask
        log_p = logits.log_softmax(-1)
        self.logprob = log_p.gather(-1, self.targets[..., None])[..., 0]
        possible = log_p > -torch.inf
        self.entropy = -torch.where(possible, log_p.exp() * log_p, 0.0).sum(-1)

    def linear(self) -> Tensor:
        terms = -self.logprob * sides()["of_tokens"] - 0.3 * self.entropy.square()
        return terms[self.mask].sum()

    def cross_entropy(self) -> Tensor:
        return F.cross_entropy(self.logits[self.mask], self.targets[self.mask])

    def smoothed(self) -> Tensor:
        logits, targets = self.logits[self.mask], self.targets[self.mask]
        z_loss = logits.logsumexp(-1).square().mean()
        return F.cross_entropy(logits, targets, label_smoothing=0.2) + 0.01 * z_loss

    def dpo(self, **options) -> Tensor:
        losses, _ = fastrlhf.dpo_loss(
            self.logprob, sides()["ref_sums"], *PAIRS.values(), mask=self.mask, **options
        )
        return losses.mean()

    def policy(self, **options) -> Tensor:
        s = sides()
        return fastrlhf.policy_loss(
            self.logprob, s["old"], s["gain"], self.mask, ref_logprobs=s["ref"],
            entropy=self.entropy, **options,
        )[0]  # fmt: skip


PPO = {"kl_coef": 0.1, "entropy_coef": 0.01}
GSPO = {
    "ratio_level": "sequence", "reduction": "sequence-mean", "clip_low": 0.9, "clip_high": 1e3,
}  # fmt: skip
LOSSES = {
    "linear": (
        Plain.linear,
        lambda m, b, **o: fastrlhf.model_linear_loss(
            own_loss, m, b["input_ids"], b["attention_mask"], sides()["of_tokens"],
            **{name: x for name, x in b.items() if name not in ("input_ids", "attention_mask")},
            entropy=True, **o,
        ),
    ),
    "cross-entropy": (Plain.cross_entropy, lambda m, b, **o: fastrlhf.sft_loss(m, **b, **o)),
    "smoothed": (
        Plain.smoothed,
        lambda m, b, **o: fastrlhf.model_cross_entropy(
            m, **b, label_smoothing=0.2, z_loss=0.01, **o
        ),
    ),
    "dpo": (Plain.dpo, lambda m, b, **o: dpo(m, b, **o)),
    "ipo": (
        lambda plain: plain.dpo(loss_type="ipo"),
        lambda m, b, **o: dpo(m, b, loss_type="ipo", **o),
    ),
    "aot": (  # sorts over the batch
        lambda plain: plain.dpo(loss_type="aot"),
        lambda m, b, **o: dpo(m, b, loss_type="aot", **o),
    ),
    "ppo": (lambda plain: plain.policy(**PPO), lambda m, b, **o: policy(m, b, **PPO, **o)),
    "gspo": (lambda plain: plain.policy(**GSPO), lambda m, b, **o: policy(m, b, **GSPO, **o)),
}  # fmt: skip


def dpo(model: nn.Module, inputs: dict[str, Tensor], **options) -> tuple:
    inputs = dict(inputs)
    ids, attention = inputs.pop("input_ids"), inputs.pop("attention_mask")
    losses, *rest = fastrlhf.model_dpo_loss(
        model, ids, attention, sides()["ref_sums"], **PAIRS, **inputs, **options
    )
    return losses.mean(), *rest


def policy(model: nn.Module, inputs: dict[str, Tensor], **options) -> tuple:
    inputs, s = dict(inputs), sides()
    ids, attention = inputs.pop("input_ids"), inputs.pop("attention_mask")
    return fastrlhf.model_policy_loss(
        model, ids, attention, s["old"], s["gain"], ref_logprobs=s["ref"], **inputs, **options
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def assert_same(ours: Tensor, plain: Tensor, model: nn.Module, tolerance: float = 1e-9) -> None:
    """Compare a loss and the gradient of every parameter, each relative to its own size."""
    assert abs(float((ours - plain).detach())) <= tolerance * max(1.0, abs(float(plain.detach())))
    found, wanted = gradients(model, ours), gradients(model, plain)
    assert found.keys() == wanted.keys()
    scale = max(float(g.norm()) for g in wanted.values())
    assert scale > 0
    for name, want in wanted.items():
        bound = tolerance * max(float(want.norm()), 1e-6 * scale)
        assert float((found[name] - want).norm()) <= bound, name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loss_is_that_of_the_models_logits(name, loss) -> None:
    exact = name != "Mixtral"  # whose experts know no fp64
    model = make(name).double() if exact else make(name)
    plain, ours = LOSSES[loss]
    found = ours(model, batch(), chunk_size=4)[0]
    assert_same(found, plain(Plain(model, batch())), model, 1e-9 if exact else 1e-4)


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
def test_padding_on_the_left_changes_nothing(loss) -> None:
    model, inputs = make("GPT2").double(), batch()
    inputs["attention_mask"][:] = 1
    inputs["mask"] = torch.arange(TOKENS).expand(SEQUENCES, -1) >= 5
    padded = {name: torch.cat((x.new_zeros(SEQUENCES, 4), x), 1) for name, x in inputs.items()}
    _, ours = LOSSES[loss]

    def widened(x: Tensor) -> Tensor:
        return torch.cat((x.new_full((SEQUENCES, 4), torch.nan), x), dim=1)

    of_tokens = ("old", "ref", "of_tokens")
    wide = {name: widened(x) if name in of_tokens else x for name, x in sides().items()}
    whole = ours(model, inputs)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "sides", lambda: wide)
        assert_same(ours(model, padded)[0], whole, model)


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
        patch.setitem(globals(), "sides", lambda: s)
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


def packed(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The same tokens without padding, one sequence after the other; and which they are."""
    there = inputs["attention_mask"].bool()
    lengths = there.sum(1)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    rows = {name: inputs[name][there].unsqueeze(0) for name in ("input_ids", "mask")}
    return {**rows, "attention_mask": None, "cu_seqlens": cu_seqlens}, there


def packed_sides(there: Tensor) -> dict[str, Tensor]:
    """What is of tokens, packed; garbage at the border of two sequences."""
    found = sides()
    for name in ("old", "ref", "of_tokens"):
        of_position = torch.cat((found[name], torch.full((SEQUENCES, 1), torch.nan)), dim=1)
        found[name] = of_position[there][:-1].unsqueeze(0)
    return found


APART = [name for name in ARCHITECTURES if name not in ("Bloom", "FalconH1", "OPT")]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", APART)
def test_packed_sequences_have_the_loss_of_padded_ones(name, loss, monkeypatch) -> None:
    model = make(name).double() if name != "Mixtral" else make(name)
    rows, there = packed(batch())
    plain, ours = LOSSES[loss]
    whole = plain(Plain(model, batch()))
    of_rows = packed_sides(there)
    monkeypatch.setitem(globals(), "sides", lambda: of_rows)
    # Attention is normalised in fp32, in another order.
    assert_same(
        ours(model, rows, chunk_size=4)[0], whole, model, 1e-5 if name != "Mixtral" else 1e-3
    )


@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
def test_empty_and_single_sequences_among_packed_ones(loss, monkeypatch) -> None:
    """Sequences without tokens at the ends and in the middle, and of one token, change nothing."""
    model = make("Llama").double()
    rows, there = packed(batch())
    borders = rows["cu_seqlens"].tolist()
    ids, mask = rows["input_ids"][0], rows["mask"][0]
    one = ids.new_tensor([3]), mask.new_tensor([True])
    first, second, third, end = borders
    assert first == 0
    with_more = {
        "input_ids": torch.cat((ids[:second], one[0], ids[second:]))[None],
        "mask": torch.cat((mask[:second], one[1], mask[second:]))[None],
        "attention_mask": None,
        "cu_seqlens": torch.tensor(
            [0, 0, second, second + 1, second + 1, third + 1, end + 1, end + 1]
        ),
    }
    place = [1, 4, 5]  # of the sequences that there were
    of_rows = packed_sides(there)
    more = dict(of_rows)
    for name, x in of_rows.items():
        if x.ndim == 2:  # of tokens
            garbage = x.new_full((1, 1), torch.nan)
            more[name] = torch.cat((x[:, : second - 1], garbage, x[:, second - 1 :]), dim=1)
        else:
            more[name] = x.new_zeros(7).index_copy(0, torch.tensor(place), x)
    teacher = make("GPT2").double()

    def run(
        inputs: dict[str, Tensor], found: dict[str, Tensor], pairs: dict[str, Tensor]
    ) -> Tensor:
        monkeypatch.setitem(globals(), "sides", lambda: found)
        monkeypatch.setitem(globals(), "PAIRS", pairs)
        if loss == "divergence":
            return fastrlhf.model_kl_divergence(model, teacher, **inputs).sum()
        return LOSSES[loss][1](model, inputs)[0]

    moved = {name: torch.tensor(place)[x] for name, x in PAIRS.items()}
    whole = run(rows, of_rows, dict(PAIRS))
    found = run(with_more, more, moved)
    if loss == "gspo":  # a mean over all sequences
        found = found * 7 / 3
    assert_same(found, whole, model, 1e-5)


def test_a_temperature_of_each_sequence_packed_or_padded() -> None:
    model, inputs = make("Llama").double(), batch()
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    rows, there = packed(inputs)
    wide, narrow = (
        fastrlhf.model_token_stats(model, **given, temperature=temperature).logprob
        for given in (inputs, rows)
    )
    expected = torch.cat((wide, wide.new_zeros(3, 1)), dim=1)[there][:-1]
    torch.testing.assert_close(narrow[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in APART])
def test_models_that_let_packed_sequences_see_each_other_are_refused(name) -> None:
    rows, _ = packed(batch())
    with pytest.raises(TypeError, match=r"^model: .*packed sequences"):
        fastrlhf.model_token_stats(make(name), **rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_new_model_lets_sequences_see_is_found_in_any_precision(dtype) -> None:
    """Its weights are as small as at the start of a training."""
    config = transformers.OPTConfig(**ARCHITECTURES["OPT"])
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    rows, _ = packed(batch())
    with pytest.raises(TypeError, match=r"^model: OPT.*packed sequences apart"):
        fastrlhf.model_token_stats(model, **rows)


def restarting() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])


def test_positions_that_start_again_pack_as_borders_do() -> None:
    model, ids = make("Llama").double(), batch()["input_ids"][:1]
    cu_seqlens = torch.tensor([0, 4, 7, 9])
    by_borders = fastrlhf.sft_loss(model, ids, cu_seqlens=cu_seqlens)[0]
    for given in (
        {"position_ids": restarting()},
        {"position_ids": restarting(), "cu_seqlens": cu_seqlens},
        {"position_ids": None, "cu_seqlens": cu_seqlens, "use_cache": None, "labels": None},
        {"cu_seqlens": cu_seqlens, "use_cache": False, "logits_to_keep": 0},
    ):
        found = fastrlhf.sft_loss(model, ids, **given)[0]
        torch.testing.assert_close(found, by_borders, rtol=1e-12, atol=0)
    with pytest.raises(TypeError, match=r"^model: OPT.*packed sequences apart"):
        fastrlhf.sft_loss(make("OPT"), ids, position_ids=restarting())
    fastrlhf.sft_loss(make("OPT"), ids, position_ids=torch.arange(TOKENS)[None])


def test_packed_inference_then_training() -> None:
    """The trial of a model needs a gradient, whatever surrounds the first call."""
    model, rows = make("Llama"), packed(batch())[0]
    with torch.inference_mode():
        first = fastrlhf.sft_loss(model, **rows)[0]
    found = fastrlhf.sft_loss(model, **rows)[0]
    torch.testing.assert_close(found.detach(), first)
    assert gradients(model, found).keys() == dict(model.named_parameters()).keys()


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


def test_packed_log_probs_of_a_model_go_into_packed_losses() -> None:
    model, rows = make("Llama").double(), packed(batch())[0]
    ids, mask, cu_seqlens = rows["input_ids"], rows["mask"], rows["cu_seqlens"]
    logprobs = fastrlhf.model_token_stats(model, **rows).logprob
    kept = fastrlhf.shift_targets(ids, mask, cu_seqlens=cu_seqlens) != -100
    sums = fastrlhf.sequence_logprobs(F.pad(logprobs, (0, 1)), kept, cu_seqlens=cu_seqlens)
    wide = fastrlhf.model_token_stats(model, **batch()).logprob
    expected = fastrlhf.sequence_logprobs(wide, batch()["mask"][:, 1:])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^cu_seqlens: .*F\.pad\(x, \(0, 1\)\)"):
        fastrlhf.sequence_logprobs(logprobs, cu_seqlens=cu_seqlens)


def test_packed_sequences_with_a_mask_of_their_own() -> None:
    """What a 4-d attention mask says is taken at its word."""
    model = make("OPT").double()
    rows, there = packed(batch())
    ids = torch.repeat_interleave(torch.arange(3), rows["cu_seqlens"].diff())
    place = torch.arange(len(ids))
    seen = (ids[:, None] == ids) & (place[:, None] >= place)
    attention = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    found = fastrlhf.model_token_stats(
        model, **{**rows, "attention_mask": attention[None, None]}
    ).logprob
    wide = fastrlhf.model_token_stats(model, **batch()).logprob
    expected = torch.cat((wide, wide.new_zeros(3, 1)), dim=1)[there][:-1]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
def test_a_batch_in_which_nothing_is_scored(loss, trained) -> None:
    model, teacher = make("Llama"), make("GPT2")
    inputs = batch()
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    with torch.set_grad_enabled(trained):
        if loss == "divergence":
            made = fastrlhf.model_kl_divergence(model, teacher, **inputs).sum()
        else:
            made = LOSSES[loss][1](model, inputs)[0]
    assert made.requires_grad == trained
    if trained:
        found = gradients(model, made)
        assert found.keys() == dict(model.named_parameters()).keys()
        assert not any(g.any() for g in found.values())
    if loss not in ("dpo", "ipo", "aot"):
        assert made == 0


@pytest.mark.parametrize("loss", [*LOSSES, "divergence"])
def test_the_outputs_come_along_without_logits(loss) -> None:
    model, inputs = make("Mixtral"), batch()
    options = {"output_router_logits": True, "output_hidden_states": True, "return_outputs": True}
    if loss == "divergence":
        values, outputs = fastrlhf.model_kl_divergence(model, make("Mixtral"), **inputs, **options)
        assert values.shape == (SEQUENCES, TOKENS - 1)
    else:
        *found, outputs = LOSSES[loss][1](model, inputs, **options)
        assert len(found) == 2
    assert len(outputs.hidden_states) == 3 and len(outputs.router_logits) == 2
    assert outputs.get("logits") is None
    assert outputs.aux_loss.requires_grad


def test_metrics_are_those_of_the_losses_of_log_probs() -> None:
    model, inputs, s = make("Llama").double(), batch(), sides()
    plain = Plain(model, inputs)
    _, metrics = policy(model, inputs, **PPO)
    _, wanted = fastrlhf.policy_loss(
        plain.logprob, s["old"], s["gain"], plain.mask, ref_logprobs=s["ref"],
        entropy=plain.entropy, **PPO,
    )  # fmt: skip
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(metrics[name], value, msg=name)
    _, rewards = dpo(model, inputs)
    _, expected = fastrlhf.dpo_loss(plain.logprob, s["ref_sums"], *PAIRS.values(), mask=plain.mask)
    torch.testing.assert_close(rewards, expected)
    loss, metrics = fastrlhf.sft_loss(model, **inputs, label_smoothing=0.1, z_loss=0.1)
    assert metrics.keys() == {"nll", "z_loss", "tokens"}
    assert metrics["tokens"] == plain.mask.sum()
    torch.testing.assert_close(metrics["nll"], plain.cross_entropy())
    z_loss = 0.1 * plain.logits[plain.mask].logsumexp(-1).square().mean()
    torch.testing.assert_close(metrics["z_loss"], z_loss)
    assert not any(x.requires_grad for x in metrics.values())
    for normalizer in (40, torch.tensor(40.0)):
        found, _ = fastrlhf.sft_loss(
            model, **inputs, label_smoothing=0.1, z_loss=0.1, normalizer=normalizer
        )
        torch.testing.assert_close(found, loss * plain.mask.sum() / 40)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize(
    "options",
    [{"loss_type": "dft"}, {"loss_type": "dft", "z_loss": 0.01}, {"label_smoothing": 0.2}],
)
def test_tokens_weigh_what_they_are_given_and_dft_what_they_are_likely(
    options, name, layout
) -> None:
    model, inputs = make(name).double(), batch()
    weights = sides()["of_tokens"]
    plain = Plain(model, inputs)
    targets = torch.where(plain.mask, plain.targets, -100)
    wanted = fastrlhf.cross_entropy(plain.logits, targets, weights=weights, **options)
    given, of_tokens = dict(inputs), weights
    if layout == "packed":
        given, there = packed(inputs)
        of_tokens = packed_sides(there)["of_tokens"]
    found, metrics = fastrlhf.sft_loss(model, **given, weights=of_tokens, **options)
    assert_same(found, wanted, model, 1e-9 if layout == "padded" else 1e-5)
    nll = -plain.logprob[plain.mask].mean()
    torch.testing.assert_close(metrics["nll"], nll.detach(), rtol=1e-5, atol=0)
    z_loss = options.get("z_loss", 0) * plain.logits[plain.mask].logsumexp(-1).square().mean()
    torch.testing.assert_close(metrics["z_loss"].double(), z_loss.detach(), rtol=1e-5, atol=0)


def test_reference_log_probs_of_tokens_and_losses_that_are_weighed() -> None:
    model, inputs, s = make("Llama").double(), batch(), sides()
    plain = Plain(model, inputs)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    losses, _ = fastrlhf.model_dpo_loss(
        model, inputs["input_ids"], inputs["attention_mask"], s["ref"], **PAIRS,
        mask=inputs["mask"], chunk_size=4,
    )  # fmt: skip
    wanted, _ = fastrlhf.dpo_loss(plain.logprob, s["ref"], *PAIRS.values(), mask=plain.mask)
    assert_same((losses * weights).sum(), (wanted * weights).sum(), model)


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_losses_without_a_reference(layout, loss_type) -> None:
    model, inputs = make("Llama").double(), batch()
    plain = Plain(model, inputs)
    hidden, head = fastrlhf.head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    targets = fastrlhf.shift_targets(inputs["input_ids"], inputs["mask"])
    wanted, _ = fastrlhf.linear_dpo_loss(
        hidden, head.weight, targets, None, *PAIRS.values(), loss_type=loss_type
    )
    assert plain.logprob.shape == targets[:, 1:].shape
    given = inputs if layout == "padded" else packed(inputs)[0]
    ids, attention = given.pop("input_ids"), given.pop("attention_mask")
    found, _ = fastrlhf.model_dpo_loss(
        model, ids, attention, None, **PAIRS, **given, loss_type=loss_type
    )
    assert_same(found.mean(), wanted.mean(), model, 1e-9 if layout == "padded" else 1e-5)


B_T, B_T1 = (SEQUENCES, TOKENS), (SEQUENCES, TOKENS - 1)
WRONG = {
    "old_logprobs of T": (
        lambda m, b: policy_of(m, b, old_logprobs=torch.zeros(B_T)),
        ValueError,
        r"^old_logprobs: expected shape \(3, 8\).*old_logprobs\[:, 1:\].*\[:, :-1\]",
    ),
    "advantages of T": (
        lambda m, b: policy_of(m, b, advantages=torch.zeros(B_T)),
        ValueError,
        r"^advantages: expected shape \(3, 8\).*advantages\[:, 1:\]",
    ),
    "advantages of other sequences": (
        lambda m, b: policy_of(m, b, advantages=torch.zeros(4)),
        ValueError,
        r"^advantages: expected shape",
    ),
    "mask of T - 1": (
        lambda m, b: policy_of(m, b, mask=b["mask"][:, 1:]),
        ValueError,
        r"^mask: expected shape \(3, 9\).*column of zeros before it",
    ),
    "no mask": (
        lambda m, b: fastrlhf.model_dpo_loss(
            m, b["input_ids"], None, torch.zeros(3), **PAIRS, mask=None
        ),
        TypeError,
        r"^mask: ",
    ),
    "side inputs of T": (
        lambda m, b: fastrlhf.model_linear_loss(
            own_loss, m, b["input_ids"], None, torch.zeros(B_T)
        ),
        ValueError,
        r"^side_inputs\[0\]: expected shape \(3, 8\)",
    ),
    "groups of T": (
        lambda m, b: fastrlhf.model_linear_loss(
            own_loss, m, b["input_ids"], groups=torch.zeros(B_T, dtype=torch.long)
        ),
        ValueError,
        r"^groups: expected shape \(3, 8\)",
    ),
    "reference of T": (
        lambda m, b: fastrlhf.model_dpo_loss(
            m, b["input_ids"], None, torch.zeros(B_T), **PAIRS, mask=b["mask"]
        ),
        ValueError,
        r"^ref_logps: expected shape \(3, 8\)",
    ),
    "pairs": (
        lambda m, b: fastrlhf.model_dpo_loss(
            m,
            b["input_ids"],
            None,
            torch.zeros(3),
            torch.tensor([0]),
            torch.tensor([3]),
            mask=b["mask"],
        ),
        ValueError,
        r"^yl_idxs: expected indices in \[0, 3\)",
    ),
    "an option": (
        lambda m, b: policy_of(m, b, cliprange=0.2),
        TypeError,
        r"^cliprange: .*LlamaForCausalLM",
    ),
    "labels": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"], labels=b["input_ids"]),
        ValueError,
        "^labels: ",
    ),
    "weights of T": (
        lambda m, b: fastrlhf.sft_loss(m, **b, weights=torch.zeros(B_T)),
        ValueError,
        r"^weights: expected shape \(3, 8\).*weights\[:, 1:\]",
    ),
    "weights that are words": (
        lambda m, b: fastrlhf.sft_loss(m, **b, weights="dft"),
        TypeError,
        "^weights: expected a tensor",
    ),
    "dft of a smooth label": (
        lambda m, b: fastrlhf.sft_loss(m, **b, label_smoothing=0.1, loss_type="dft"),
        ValueError,
        "^label_smoothing: expected 0 with loss_type 'dft'",
    ),
    "smoothing": (
        lambda m, b: fastrlhf.sft_loss(m, **b, label_smoothing=2),
        ValueError,
        "^label_smoothing: ",
    ),
    "normalizer": (
        lambda m, b: fastrlhf.sft_loss(m, **b, normalizer=0),
        ValueError,
        "^normalizer: ",
    ),
    "vocabularies": (
        lambda m, b: fastrlhf.model_kl_divergence(
            m, make("Llama", vocab_size=90), b["input_ids"] % 90
        ),
        ValueError,
        "^teacher: expected a vocabulary of 101.*90",
    ),
    "itself": (
        lambda m, b: fastrlhf.model_kl_divergence(m, m, **b),
        ValueError,
        "^teacher: expected another",
    ),
    "direction": (
        lambda m, b: fastrlhf.model_kl_divergence(m, make("GPT2"), **b, direction="left"),
        ValueError,
        "^direction: ",
    ),
    "packed rows": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"], cu_seqlens=torch.tensor([0, 27])),
        ValueError,
        "^cu_seqlens: ",
    ),
    "borders": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"][:1], cu_seqlens=torch.tensor([0, 8])),
        ValueError,
        "^cu_seqlens: expected to end at 9",
    ),
    "packed with a cache": (
        lambda m, b: fastrlhf.sft_loss(
            m, b["input_ids"][:1], cu_seqlens=torch.tensor([0, 4, 9]), use_cache=True
        ),
        ValueError,
        "^use_cache: expected none with packed sequences",
    ),
    "packed after a cache": (
        lambda m, b: fastrlhf.sft_loss(
            m,
            b["input_ids"][:1],
            position_ids=restarting(),
            past_key_values=transformers.DynamicCache(),
        ),
        ValueError,
        "^past_key_values: expected none with packed sequences",
    ),
    "positions that go on": (
        lambda m, b: fastrlhf.sft_loss(
            m,
            b["input_ids"][:1],
            cu_seqlens=torch.tensor([0, 4, 9]),
            position_ids=torch.arange(TOKENS)[None],
        ),
        ValueError,
        "^position_ids: expected to go on by 1 within the sequences",
    ),
    "positions with a mask": (
        lambda m, b: fastrlhf.sft_loss(
            m, b["input_ids"][:1], torch.ones(1, TOKENS), position_ids=restarting()
        ),
        ValueError,
        "^attention_mask: expected None where position_ids start again",
    ),
    "the name of the Trainer": (
        lambda m, b: fastrlhf.sft_loss(m, **b, num_items_in_batch=3),
        ValueError,
        "^num_items_in_batch: expected none.*normalizer",
    ),
    "tokens seen ahead": (
        lambda m, b: fastrlhf.sft_loss(m, **b, is_causal=False),
        ValueError,
        "^is_causal: expected none",
    ),
    "some logits": (
        lambda m, b: fastrlhf.sft_loss(m, **b, logits_to_keep=torch.arange(8, -1, -1)),
        ValueError,
        "^logits_to_keep: expected none",
    ),
    "no sequence": (
        lambda m, b: fastrlhf.sft_loss(m, b["input_ids"][:0]),
        ValueError,
        r"^input_ids: expected shape \(B, T\), neither 0",
    ),
    "packed with a mask": (
        lambda m, b: fastrlhf.sft_loss(
            m, b["input_ids"][:1], torch.ones(1, TOKENS), cu_seqlens=torch.tensor([0, 4, 9])
        ),
        ValueError,
        "^attention_mask: expected None with cu_seqlens",
    ),
}


def policy_of(model: nn.Module, inputs: dict[str, Tensor], **change) -> tuple:
    given = {
        "old_logprobs": torch.zeros(B_T1), "advantages": torch.zeros(SEQUENCES), **inputs, **change,
    }  # fmt: skip
    return fastrlhf.model_policy_loss(model, **given)


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument_and_say_what_to_do(case) -> None:
    call, error, message = WRONG[case]
    model = make("Llama")
    with pytest.raises(error, match=message):
        call(model, batch())
    # The model is as it was.
    assert "forward" not in vars(model.get_output_embeddings())


def test_transforms_are_refused_or_work() -> None:
    model, inputs = make("Llama"), batch()
    parameters = dict(model.named_parameters())
    fastrlhf.model_token_stats(model, **inputs)

    def of(loss: str):
        def function(values: dict[str, Tensor]) -> Tensor:
            with torch.nn.utils.stateless._reparametrize_module(model, values):
                return LOSSES[loss][1](model, inputs)[0].float()

        return function

    for loss in ("linear", "cross-entropy"):
        with pytest.raises(RuntimeError, match=r"^model_\w+: .*torch\.func"):
            torch.func.grad(of(loss))(parameters)
    for loss in ("dpo", "ppo", "gspo"):
        found = torch.func.grad(of(loss))(parameters)
        wanted = gradients(model, LOSSES[loss][1](model, inputs)[0].float())
        for name, want in wanted.items():
            torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-5, msg=name)
