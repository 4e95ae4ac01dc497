"""A call of each public function: what it returns, and whose gradients are looked at.

Random cases of `support.fuzz` call most functions of tensors already; here are all options by name,
the compiled backend, models, and what has no random case.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

import fastrlhf
from fastrlhf.losses.preference import LOSS_TYPES
from support import tiny_models

Call = Callable[[], tuple[Any, Sequence[Tensor]]]
CALLS: dict[str, Call] = {}

ROWS, TOKENS, VOCAB, WIDTH = 6, 7, 37, 12
W, L = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])
OF_SEQUENCES = torch.tensor([0, 0, 0, 1, 1, 1])
CU_SEQLENS = torch.arange(0, ROWS * TOKENS + 1, TOKENS)


def choices(function: Callable, option: str) -> list[str]:
    """The strings that an option of a function may be, from its signature."""

    def strings(annotation: Any) -> list[str]:
        if isinstance(annotation, str):
            return [annotation]
        return [name for part in get_args(annotation) for name in strings(part)]

    return list(dict.fromkeys(strings(inspect.signature(function).parameters[option].annotation)))


def call(name: str) -> Callable[[Call], Call]:
    """Put a call into the table, under a name that no other has."""

    def put(function: Call) -> Call:
        assert name not in CALLS, name
        CALLS[name] = function
        return function

    return put


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def lengths_mask() -> Tensor:
    """Sequences of all lengths, one of them empty."""
    return torch.arange(TOKENS) < torch.tensor([[7], [4], [6], [1], [0], [3]])


def logprobs() -> Tensor:
    return leaf(-random(ROWS, TOKENS).abs())


def near(x: Tensor, by: float = 0.3) -> Tensor:
    return x.detach() + by * random(*x.shape)


def pair_calls() -> None:
    """Preference losses: of sequences and of tokens."""

    def options_of(kind: str) -> dict[str, Any]:
        # Which its paper takes, and which may not be 0.
        smoothing = {"label_smoothing": 1e-3} if kind == "exo_pair" else {}
        return {"loss_type": kind, **smoothing}

    for kind in LOSS_TYPES:

        @call(f"dpo_loss {kind}")
        def _(kind: str = kind):
            logps, lengths = leaf(random(ROWS) * 3), torch.arange(1, ROWS + 1)
            options = options_of(kind)
            return fastrlhf.dpo_loss(logps, near(logps), W, L, lengths=lengths, **options), [logps]

        @call(f"dpo_loss of tokens {kind}")
        def _(kind: str = kind):
            logps, mask = logprobs(), lengths_mask().roll(1, 0) | (torch.arange(TOKENS) < 1)
            options = options_of(kind)
            return fastrlhf.dpo_loss(logps, near(logps), W, L, 0.2, mask=mask, **options), [logps]

    for kind in choices(fastrlhf.kto_loss, "loss_type"):

        @call(f"kto_loss {kind}")
        def _(kind: str = kind):
            logps = leaf(random(ROWS) * 3)
            desirable = torch.arange(ROWS) % 2 == 0
            kl = None if kind == "apo_zero_unpaired" else fastrlhf.kto_kl(logps, near(logps))
            return fastrlhf.kto_loss(
                logps, near(logps), desirable, kl, loss_type=kind, undesirable_weight=1.3
            ), [logps]

    for kind in choices(fastrlhf.cpo_loss, "loss_type"):

        @call(f"cpo_loss {kind}")
        def _(kind: str = kind):
            logps = leaf(random(ROWS) * 3)
            lengths = torch.arange(1, ROWS + 1)
            return fastrlhf.cpo_loss(logps, W, L, loss_type=kind, lengths=lengths), [logps]

    @call("simpo, orpo")
    def _():
        logps, lengths = leaf(-random(ROWS).abs()), torch.arange(1, ROWS + 1)
        simpo = fastrlhf.simpo_loss(logps, lengths, W, L, label_smoothing=0.1)
        return (simpo, fastrlhf.orpo_loss(logps, lengths, W, L)), [logps]

    @call("tpo, Plackett and Luce")
    def _():
        logps, ranks = leaf(random(ROWS)), torch.tensor([0, 1, 2, 0, 1, 2])
        tpo = fastrlhf.tpo_loss(logps, W, L, W)
        dpo = fastrlhf.plackett_luce_dpo_loss(logps, near(logps), OF_SEQUENCES, ranks)
        scores = fastrlhf.plackett_luce_loss(logps, OF_SEQUENCES, ranks)
        return (tpo, dpo, scores, fastrlhf.ranked_pairs(OF_SEQUENCES, ranks)), [logps]

    @call("wpo_weights, sequence_logprobs")
    def _():
        logps, mask = logprobs(), lengths_mask()
        sums = fastrlhf.sequence_logprobs(logps, mask, average=True)
        return (sums, fastrlhf.wpo_weights(logps.detach(), mask)), [logps]

    @call("reward_loss, process rewards")
    def _():
        scores, mask = leaf(random(ROWS, TOKENS)), lengths_mask()
        pairs = fastrlhf.reward_loss(scores[W, 0], scores[L, 0], margin=None, center_coef=0.01)
        labels = (random(ROWS, TOKENS) > 0).long()
        steps = fastrlhf.process_reward_loss(scores, labels, mask)
        how = choices(fastrlhf.process_reward_scores, "how")
        answers = [fastrlhf.process_reward_scores(scores, mask, name) for name in how]
        return (pairs, steps, answers), [scores]


def policy_calls() -> None:
    """Policy losses of log-probs, and what surrounds them."""

    def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logps = logprobs()
        return logps, near(logps), random(ROWS, TOKENS), lengths_mask()

    for kind in choices(fastrlhf.grpo_loss, "loss_type"):

        @call(f"grpo_loss {kind}")
        def _(kind: str = kind):
            logps, old, advantages, mask = batch()
            options = fastrlhf.grpo_options(kind)
            needs = {"normalizer": 50.0} if options.get("reduction") == "constant" else {}
            if options.get("ratio_level", "token") != "token":
                advantages = advantages[:, 0]
            ref = None if options.get("kl_reference") == "old" else near(logps)
            return fastrlhf.grpo_loss(
                logps, old, advantages, mask, loss_type=kind, ref_logprobs=ref, **needs
            ), [logps]

    for kind in choices(fastrlhf.policy_loss, "kl_estimator"):

        @call(f"policy_loss with {kind}")
        def _(kind: str = kind):
            logps, old, advantages, mask = batch()
            entropy = leaf(random(ROWS, TOKENS).abs())
            return fastrlhf.policy_loss(
                logps, old, advantages, mask, ref_logprobs=near(logps), kl_coef=0.1,
                kl_estimator=kind, entropy=entropy, entropy_coef=0.01, dual_clip=3.0,
                rollout_weights=random(ROWS, TOKENS).abs(), kl_bias_correction=kind == "k3",
            ), [logps, entropy]  # fmt: skip

    @call("ppo_loss, packed")
    def _():
        logps, old, advantages, mask = batch()
        packed = [x.reshape(1, -1) for x in (logps, old, advantages, mask)]
        return fastrlhf.ppo_loss(*packed, cu_seqlens=CU_SEQLENS), [logps]

    @call("value_loss")
    def _():
        values, old, returns, mask = batch()
        return fastrlhf.value_loss(values, old, returns, mask), [values]

    for kind in choices(fastrlhf.group_advantages, "kind"):

        @call(f"group_advantages {kind}")
        def _(kind: str = kind):
            given = {"opo": {"lengths": torch.arange(1, ROWS + 1)}, "pass@k": {"k": 2}}
            given |= {"grpo_passk": {}, "remax": {"baselines": random(ROWS)}}
            rewards = (random(ROWS) > 0).float()
            return fastrlhf.group_advantages(
                rewards, OF_SEQUENCES, kind=kind, **given.get(kind, {})
            ), []

    @call("advantages and returns")
    def _():
        rewards, values, more, mask = (x.detach() for x in batch())
        estimates = fastrlhf.gae(rewards, values, mask, gamma=0.99, impl="eager")
        with_kernel = fastrlhf.gae(rewards, values, mask, gamma=0.99, impl="triton")
        returns = fastrlhf.monte_carlo_returns(rewards, mask, gamma=0.9)
        lengths = fastrlhf.length_adaptive_lambda(mask.sum(1).clamp(min=1))
        gdpo = fastrlhf.gdpo_advantages(more[:, :2], OF_SEQUENCES)
        return (estimates, with_kernel, returns, lengths, gdpo, fastrlhf.whiten(more, mask)), []

    @call("rewards")
    def _():
        logps, ref, _, mask = batch()
        shaped = fastrlhf.shaped_rewards(
            random(ROWS), logps.detach(), ref, mask.roll(1, 0) | mask, kl_coef=0.1
        )
        return (shaped, fastrlhf.outcome_rewards(random(ROWS), mask)), []

    @call("corrections of rollouts")
    def _():
        logps, rollout, _, mask = batch()
        modes = choices(fastrlhf.rollout_correction, "mode")
        weights = [
            fastrlhf.rollout_correction(
                logps.detach(), rollout, mask, mode=mode,
                **({"clip_min": 0.5} if mode.endswith("mask") else {}),
            )
            for mode in modes
        ]  # fmt: skip
        rejected = [
            fastrlhf.rollout_rejection(
                logps.detach(), rollout, mask, level=level, estimator="k3", upper=0.1
            )
            for level in choices(fastrlhf.rollout_rejection, "level")
        ]
        return (weights, rejected, fastrlhf.rollout_metrics(logps.detach(), rollout, mask)), []

    @call("choices of tokens and samples")
    def _():
        logps, entropy, advantages, mask = batch()
        return (
            fastrlhf.top_entropy_mask(entropy, mask, share=0.3),
            fastrlhf.kl_cov_mask(logps.detach(), advantages, mask, share=0.2),
            fastrlhf.clip_cov_mask(logps.detach(), advantages, mask, share=0.2, low=0.0),
            [
                fastrlhf.pf_ppo_weights(
                    random(ROWS), method=method, generator=torch.Generator().manual_seed(2)
                )
                for method in choices(fastrlhf.pf_ppo_weights, "method")
            ],
            fastrlhf.global_normalizer(mask),
        ), []


def logits_calls() -> None:
    """From logits, by all backends."""
    everything = {"entropy": True, "with_stats": ("is_top1", "mean_logit", "log_sum_sq_probs")}
    for impl in ("eager", "triton", "compiled"):

        @call(f"token_stats {impl}")
        def _(impl: str = impl):
            logits = leaf(random(ROWS, TOKENS, VOCAB) * 3)
            targets = torch.randint(VOCAB, (ROWS, TOKENS)).masked_fill(~lengths_mask(), -100)
            heat = 0.5 + torch.rand(ROWS)
            return fastrlhf.token_stats(
                logits, targets, temperature=heat, softcap=5.0, impl=impl, **everything
            ), [logits]

        @call(f"kl_divergence {impl}")
        def _(impl: str = impl):
            logits, ref = leaf(random(ROWS, VOCAB) * 3), leaf(random(ROWS, VOCAB) * 3)
            return [
                fastrlhf.kl_divergence(logits, ref, direction=direction, impl=impl, softcap=9.0)
                for direction in ("forward", "reverse", "jsd")
            ], [logits, ref]

        @call(f"cross_entropy {impl}")
        def _(impl: str = impl):
            logits = leaf(random(ROWS, VOCAB) * 3)
            targets = torch.randint(VOCAB, (ROWS,))
            return [
                fastrlhf.cross_entropy(
                    logits, targets, label_smoothing=0.1, z_loss=1e-3, loss_type=kind, impl=impl
                )
                for kind in choices(fastrlhf.cross_entropy, "loss_type")
                if kind == "nll"
            ], [logits]

    for direction in choices(fastrlhf.topk_kl_divergence, "direction"):

        @call(f"topk_kl_divergence {direction}")
        def _(direction: str = direction):
            logits = leaf(random(ROWS, VOCAB) * 3)
            teacher, ids = (random(ROWS, VOCAB) * 3).log_softmax(-1).topk(5)
            hidden, weight = leaf(random(ROWS, WIDTH)), leaf(random(VOCAB, WIDTH))
            dense = fastrlhf.topk_kl_divergence(logits, teacher, ids, direction=direction)
            linear = fastrlhf.linear_topk_kl_divergence(
                hidden, weight, teacher, ids, direction=direction, chunk_size=4
            )
            return (dense, linear), [logits, hidden, weight]

    @call("token_logprobs twice differentiated")
    def _():
        logits = leaf(random(ROWS, VOCAB))
        (slope,) = torch.autograd.grad(
            fastrlhf.token_logprobs(logits, torch.arange(ROWS)).sum(), logits, create_graph=True
        )
        return slope.square().sum(), [logits]


def head_calls() -> None:
    """From hidden states, frozen and trained, by the backends that run everywhere."""
    for impl in ("eager", "triton", "compiled"):
        for trained in (True, False):
            name = f"{impl}, {'trained' if trained else 'frozen'}"

            def head(trained: bool = trained) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
                hidden, weight = leaf(random(ROWS, TOKENS, WIDTH)), random(VOCAB, WIDTH)
                leaves = [hidden, leaf(weight)] if trained else [hidden]
                targets = torch.randint(VOCAB, (ROWS, TOKENS)).masked_fill(~lengths_mask(), -100)
                return hidden, (leaves[1] if trained else weight), targets, leaves

            @call(f"linear_token_stats {name}")
            def _(impl: str = impl, head: Callable = head):
                hidden, weight, targets, leaves = head()
                return fastrlhf.linear_token_stats(
                    hidden, weight, targets, entropy=True, chunk_size=10, impl=impl,
                    with_stats=("is_top1", "mean_logit"), temperature=0.7,
                ), leaves  # fmt: skip

            @call(f"linear_cross_entropy {name}")
            def _(impl: str = impl, head: Callable = head):
                hidden, weight, targets, leaves = head()
                return fastrlhf.linear_cross_entropy(
                    hidden, weight, targets, label_smoothing=0.1, chunk_size=10, impl=impl
                ), leaves

            @call(f"linear_policy_loss {name}")
            def _(impl: str = impl, head: Callable = head):
                hidden, weight, targets, leaves = head()
                mask, targets = targets != -100, targets.clamp(min=0)
                old = -random(ROWS, TOKENS).abs() * 3
                return fastrlhf.linear_policy_loss(
                    hidden, weight, targets, old, random(ROWS), mask, chunk_size=10, impl=impl,
                    entropy=True, entropy_coef=0.01,
                ), leaves  # fmt: skip

            for kind in ("sigmoid", "ipo", "simpo", "aot"):

                @call(f"linear_dpo_loss {kind}, {name}")
                def _(kind: str = kind, impl: str = impl, head: Callable = head):
                    hidden, weight, targets, leaves = head()
                    targets = targets.clone()
                    targets[:, 0] = 1
                    ref = None if kind == "simpo" else random(ROWS)
                    return fastrlhf.linear_dpo_loss(
                        hidden, weight, targets, ref, W, L, loss_type=kind, chunk_size=10, impl=impl
                    ), leaves

            @call(f"linear_kto_loss {name}")
            def _(impl: str = impl, head: Callable = head):
                hidden, weight, targets, leaves = head()
                desirable = torch.arange(ROWS) < 3
                return fastrlhf.linear_kto_loss(
                    hidden, weight, targets, random(ROWS), desirable, torch.tensor(0.1), impl=impl
                ), leaves

            @call(f"linear_softmax_fisher_product {name}")
            def _(impl: str = impl, head: Callable = head):
                hidden, weight, _, _leaves = head()
                tangent = random(ROWS, TOKENS, WIDTH)
                return fastrlhf.linear_softmax_fisher_product(
                    hidden.detach(), weight.detach(), tangent, mask=lengths_mask(), chunk_size=10,
                    impl=impl,
                ), []  # fmt: skip

            @call(f"linear_kl_divergence {name}")
            def _(impl: str = impl, head: Callable = head):
                hidden, weight, _, leaves = head()
                ref = random(ROWS, TOKENS, WIDTH)
                return [
                    fastrlhf.linear_kl_divergence(
                        hidden, weight, ref, weight.detach(), direction=direction,
                        mask=lengths_mask(), chunk_size=10, impl=impl,
                    )
                    for direction in ("forward", "reverse", "jsd")
                ], leaves  # fmt: skip


def model_calls() -> None:
    """Of models, and trust-region steps."""
    for name in ("Llama", "Gemma2", "Cohere"):

        def batch(name: str = name) -> tuple[Any, Tensor, Tensor, list[Tensor]]:
            model = tiny_models.make(name).eval()
            ids = torch.randint(1, tiny_models.VOCAB, (ROWS, TOKENS))
            mask = (torch.arange(TOKENS) > 1).expand(ROWS, TOKENS)
            return model, ids, mask, list(model.parameters())

        @call(f"model_token_stats {name}")
        def _(batch: Callable = batch):
            model, ids, mask, leaves = batch()
            return fastrlhf.model_token_stats(model, ids, mask=mask, entropy=True), leaves

        @call(f"model_cross_entropy {name}")
        def _(batch: Callable = batch):
            model, ids, mask, leaves = batch()
            return fastrlhf.model_cross_entropy(model, ids, mask=mask, z_loss=1e-3), leaves

        @call(f"model_dpo_loss {name}")
        def _(batch: Callable = batch):
            model, ids, mask, leaves = batch()
            return fastrlhf.model_dpo_loss(
                model, ids, None, random(ROWS) - 20, W, L, mask=mask
            ), leaves

        @call(f"model_kto_loss {name}")
        def _(batch: Callable = batch):
            model, ids, mask, leaves = batch()
            desirable = torch.arange(ROWS) < 3
            return fastrlhf.model_kto_loss(
                model, ids, None, random(ROWS) - 20, desirable, torch.tensor(0.1), mask=mask
            ), leaves

        @call(f"model_policy_loss {name}")
        def _(batch: Callable = batch):
            model, ids, mask, leaves = batch()
            return fastrlhf.model_policy_loss(
                model, ids, None, None, random(ROWS), mask=mask, **fastrlhf.grpo_options("dapo")
            ), leaves

        @call(f"model_kl_divergence {name}")
        def _(batch: Callable = batch, name: str = name):
            model, ids, mask, leaves = batch()
            teacher = tiny_models.make(name)
            with torch.no_grad():
                for parameter in teacher.parameters():
                    parameter += 0.1 * random(*parameter.shape)
            return fastrlhf.model_kl_divergence(model, teacher, ids, mask=mask), leaves

        @call(f"model_linear_loss {name}")
        def _(batch: Callable = batch):
            model, ids, mask, leaves = batch()

            def loss(stats: fastrlhf.ChunkStats) -> Tensor:
                return -stats.logprob.sum() + 0.1 * stats.lse.square().sum()

            return fastrlhf.model_linear_loss(loss, model, ids, mask=mask), leaves

        @call(f"lazy logits {name}")
        def _(batch: Callable = batch):
            model, ids, _, leaves = batch()
            with fastrlhf.lazy_logits(model):
                logits = model(ids).logits[:, :-1]
                logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
                return logps.sum((1, 2)), leaves

    @call("trust region")
    def _():
        weight, hidden = leaf(random(VOCAB, WIDTH)), random(ROWS, TOKENS, WIDTH)
        mask, targets = lengths_mask(), torch.randint(VOCAB, (ROWS, TOKENS))
        advantages = random(ROWS, TOKENS)

        def policy() -> Tensor:
            return hidden @ weight.T

        products = [
            fastrlhf.fisher_vector_product(
                policy, [weight], random(VOCAB * WIDTH), mask=mask, damping=0.1, mode=mode
            )
            for mode in ("forward", "double-vjp")
        ]
        info = fastrlhf.trpo_step(policy, [weight], targets, advantages, mask)
        return (products, info, weight), []


pair_calls()
policy_calls()
logits_calls()
head_calls()
model_calls()
