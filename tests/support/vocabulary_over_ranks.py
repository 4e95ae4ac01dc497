"""Operations whose vocabulary is cut among ranks: what each rank finds, as numbers to compare."""

import torch
import fastrlhf


def cut(x, sizes, rank, dim=0):
    return x.split(sizes, dim)[rank]


def head(group, hidden, weight, bias, targets, sizes, options, call):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    h = hidden.clone().requires_grad_()
    w = cut(weight, sizes, rank).clone().requires_grad_()
    b = None if bias is None else cut(bias, sizes, rank).clone().requires_grad_()
    stats = fastrlhf.linear_token_stats(h, w, targets, bias=b, group=group, **options)
    loss = (
        stats.logprob * torch.linspace(1, 2, stats.logprob.numel()).view_as(stats.logprob)
    ).sum()
    if stats.entropy is not None:
        loss = loss + stats.entropy.sum()
    loss.backward()
    return [x.detach() for x in (stats.logprob, stats.lse, loss, h.grad, w.grad)] + (
        [] if b is None else [b.grad]
    )
