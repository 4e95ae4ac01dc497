"""Kept ids for tests: of any lengths, in any order, with garbage where tokens are ignored."""

import torch
from torch import Tensor

Support = tuple[Tensor, Tensor]


def random_support(
    targets: Tensor, vocab: int, *, most: int = 12, alone: float = 0.3, garbage: bool = True
) -> Support:
    """The target and up to so many others, of some tokens the target alone; of ignored ones ids
    that are none.
    """
    kept = []
    for target in targets.reshape(-1).tolist():
        if target < 0:
            kept.append(torch.randint(-5, 3 * vocab, (int(torch.randint(0, 4, ())),)))
            if not garbage:
                kept[-1] = kept[-1][:0]
            continue
        count = 0 if torch.rand(()) < alone else int(torch.randint(0, min(most, vocab), ()))
        others = torch.randperm(vocab)[: count + 1]
        ids = torch.cat((others[others != target][:count], torch.tensor([target])))
        kept.append(ids[torch.randperm(len(ids))])
    return support_of(kept, targets.device)


def support_of(kept: list[Tensor], device: torch.device | str = "cpu") -> Support:
    """Put together the ids of each token."""
    lengths = torch.tensor([len(ids) for ids in kept], dtype=torch.int64)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    ids = torch.cat([*kept, torch.zeros(0, dtype=torch.int64)]).long()
    return ids.to(device), offsets.to(device)


def ids_of(support: Support, token: int) -> Tensor:
    ids, offsets = support
    return ids[offsets[token] : offsets[token + 1]]


def everything(tokens: int, vocab: int, device: torch.device | str = "cpu") -> Support:
    """All of the vocabulary, for each token in another order."""
    return support_of([torch.randperm(vocab) for _ in range(tokens)], device)


def of_each_token(
    formula, logits: Tensor, targets: Tensor, support: Support, g: Tensor, h: Tensor, **options
) -> tuple[list[Tensor], Tensor]:
    """Apply a formula of rows, (statistics, gradient) of `g·logprob + h·entropy`, to the kept
    columns of each token: log-prob, entropy and lse (N,), and the gradient (N, V); on the CPU.
    """
    logits, targets, g, h = (x.detach().cpu() for x in (logits, targets, g, h))
    values, gradient = torch.zeros(3, len(targets)).double(), torch.zeros(logits.shape).double()
    for i in (targets >= 0).nonzero().view(-1).tolist():
        ids, one = ids_of(support, i).cpu(), slice(i, i + 1)
        own = {k: x[one].cpu() if isinstance(x, Tensor) else x for k, x in options.items()}
        place = (ids == targets[i]).nonzero()[0]
        stats, d_logits = formula(logits[one, ids], place, g=g[one], h=h[one], **own)
        values[:, i] = torch.cat([x.double() for x in stats])
        gradient[i, ids] = d_logits[0].double()
    return list(values), gradient


def dense(logits: Tensor, support: Support, targets: Tensor) -> Tensor:
    """Logits (..., V) that are -inf where nothing is kept, for formulas of whole rows without a
    softcap; those of ignored tokens as they are.
    """
    kept = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    rows = kept.view(-1, logits.shape[-1])
    for i in (targets.reshape(-1) >= 0).nonzero().view(-1).tolist():
        rows[i, ids_of(support, i)] = True
    return torch.where(kept | (targets < 0).unsqueeze(-1), logits, -torch.inf)
