"""TPO, whose pairs come with a third sequence, to learn as it is.

It is built from the functions of `reference_free.py`.

Dims: B sequences, P pairs.
"""

from typing import Literal, get_args

from torch import Tensor

from fastrlhf.losses.arguments import check_pair_indices, check_pairs
from fastrlhf.losses.reference_free import chosen_nll, contrast, mean_logps
from fastrlhf.ops.checks import check_counts, check_finite, check_one_of, check_positive
from fastrlhf.reference import masked_sum

TPOLossType = Literal["sigmoid", "hinge", "ipo", "tpo-l"]


def tpo_loss(
    logps: Tensor,
    yw_idxs: Tensor,
    yl_idxs: Tensor,
    gold_idxs: Tensor,
    beta: float = 0.01,
    *,
    nll: Tensor | None = None,
    alpha: float = 1.0,
    loss_type: TPOLossType = "sigmoid",
    lengths: Tensor | None = None,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the TPO loss: a reference-free loss of each pair, plus the likelihood of a gold
    sequence of its prompt.

    Eager equivalent: `losses = -F.logsigmoid(beta * (logps[yw_idxs] - logps[yl_idxs])) - alpha *
    logps[gold_idxs]`.

    Args:
        logps: (B,) log-probs of whole sequences, in nats.
        yw_idxs, yl_idxs: (P,) integer indices of the preferred and the other sequences.
        gold_idxs: (P,) integer indices of the gold sequences.
        beta: positive scale of the reward.
        nll: (P,) or 0-d negative log-likelihood of the gold sequences; None: their sums,
            -logps[gold_idxs]. TRL's is 0-d, the mean over the tokens of all of them.
        alpha: weight of nll, 0 for none.
        loss_type: "sigmoid", "hinge" or "ipo" as `cpo_loss`; "tpo-l", which is SimPO's: of
            log-probs averaged over tokens, with a target margin.
        lengths: (B,) tokens of each sequence, for ipo and tpo-l.
        gamma: target margin of tpo-l.
        label_smoothing: probability ε in [0, 0.5] that a label is flipped, for sigmoid and tpo-l.

    Returns:
        losses (P,), differentiable with respect to logps and nll, and rewards (B,) = β·logps, of
        averages for ipo and tpo-l, detached.

    Raises:
        TypeError, ValueError: as `cpo_loss`.

    Source: 2405.16681; hinge and ipo as TRL's TPOTrainer.

    Example:
        >>> logps = torch.tensor([-10.0, -14.0, -9.0])
        >>> chosen, rejected, gold = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> losses, rewards = fastrlhf.tpo_loss(logps, chosen, rejected, gold, beta=0.1)
        >>> losses, rewards
        (tensor([9.5130]), tensor([-1.0000, -1.4000, -0.9000]))
    """
    check_pairs("logps", logps, yw_idxs, yl_idxs, None)
    check_pair_indices("logps", logps, yw_idxs, gold_idxs, names=("yw_idxs", "gold_idxs"))
    beta = check_positive("beta", beta)
    alpha, gamma = check_finite("alpha", alpha), check_finite("gamma", gamma)
    check_one_of("loss_type", loss_type, get_args(TPOLossType))
    sums = scores = masked_sum(logps, None)
    if loss_type in ("ipo", "tpo-l"):
        scores = mean_logps(logps, lengths, yw_idxs, yl_idxs)
    elif lengths is not None:
        check_counts("lengths", lengths)  # this type does not use them
    margin = scores[yw_idxs.long()] - scores[yl_idxs.long()]
    if loss_type == "tpo-l":
        losses = contrast(beta * margin - gamma, "sigmoid", 1.0, label_smoothing)
    else:
        losses = contrast(margin, loss_type, beta, label_smoothing)
    gold = chosen_nll(nll, -sums[gold_idxs.long()])
    return losses + alpha * gold, (beta * scores).detach()
