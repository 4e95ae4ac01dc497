"""A small policy in fp64 with a batch of tokens, the dense Fisher matrix of it, and what tests of
TRPO compare.
"""

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call

from fastrlhf import trpo_step

MODES = ["forward", "double-vjp", "auto"]
B, T, WIDTH, VOCAB = 3, 4, 5, 7
# fp64: what is wrong by a temperature, a count of tokens or a missing term is wrong by percents.
TOLERANCE = 1e-10


def device_inputs(device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=device)


class Batch:
    """A policy that is a small network in fp64, and the tokens of a batch."""

    def __init__(self, device, rows: slice = slice(None), headed: bool = True) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, 6), nn.Tanh(), *([nn.Linear(6, VOCAB)] if headed else [])]
        self.net = nn.Sequential(*layers).to(device, torch.float64)
        self.x = device_inputs(device, B, T, WIDTH)[rows]
        self.targets = torch.randint(VOCAB, (B, T), device=device)[rows]
        self.advantages = device_inputs(device, B, T)[rows]
        self.mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], device=device)[rows]
        self.params = list(self.net.parameters())

    def policy(self) -> Tensor:
        return self.net(self.x)

    def step(self, **options):
        arguments = {
            "policy": self.policy, "params": self.params, "targets": self.targets,
            "advantages": self.advantages, "mask": self.mask,
        }  # fmt: skip
        return trpo_step(**arguments | options)


def flat(tensors) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def bits(params) -> list[Tensor]:
    """Copies whose comparison tells -0 from 0 and takes a NaN for itself."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return [p.detach().clone().view(kind[p.element_size()]) for p in params]


def same_bits(params, before) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(params), before, strict=True))


def dense_jacobian(net: nn.Module, inputs: Tensor) -> Tensor:
    """(tokens, V, D) derivative of the logits with respect to all parameters."""
    named = dict(net.named_parameters())

    def logits(*values):
        return functional_call(net, dict(zip(named, values, strict=True)), (inputs,))

    parts = jacobian(logits, tuple(p.detach() for p in named.values()))
    lead = inputs.shape[:-1].numel()
    return torch.cat([j.reshape(lead, -1, p.numel()) for j, p in
                      zip(parts, named.values(), strict=True)], dim=-1)  # fmt: skip


def dense_fisher(batch: Batch, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """(D, D) mean of JᵀFJ over the tokens that count."""
    j = dense_jacobian(batch.net, batch.x)
    p = (batch.policy().detach() / temperature).softmax(-1).reshape(-1, VOCAB)
    of_tokens = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / temperature**2
    c = torch.ones_like(p[:, 0]) if mask is None else mask.reshape(-1).to(p)
    return torch.einsum("n,nvd,nvw,nwe->de", c / c.sum(), j, of_tokens, j)


def stepped(device, **options) -> Tensor:
    """Parameters after a step of the batch."""
    batch = Batch(device)
    assert batch.step(**{"damping": 0.01} | options).accepted
    return flat(batch.params)
