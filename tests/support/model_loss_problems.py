"""The losses of models that are tested, each beside the same loss of the model's own logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrlhf

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


def restarting() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])


B_T, B_T1 = (SEQUENCES, TOKENS), (SEQUENCES, TOKENS - 1)
