"""Find out whether a model sees the tokens that it is to predict.

Asked by `at_head.py` before the tokens of a model are scored, and by `check.py`.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .head_parts import evaluating, head_module, text_config
from .stand_in import StandIn

# For each model that may be an encoder by its config, the value of is_decoder when it was tried.
_causal: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def check_causal(base: Any) -> None:
    """Refuse an encoder: what enters its head at a token depends on the tokens after it.

    Models whose config does not say that they are decoders (those of BERT's family, which are
    either) are tried once, on three tokens of which the last is changed.

    Raises:
        TypeError: an encoder.
    """
    name, decoder = type(base).__name__, getattr(base.config, "is_decoder", None)
    if decoder or (decoder is None and "MaskedLM" not in name and "XLNet" not in name):
        return
    if _causal.get(base, base) == decoder:
        return
    if _sees_ahead(base):
        raise TypeError(
            f"model: {name} is an encoder, whose logits see the tokens that they are to predict; "
            "a decoder of its kind has is_decoder=True in its config"
        )
    _causal[base] = decoder


@torch.no_grad()
def _sees_ahead(base: Any) -> bool:
    entered: list[Tensor] = []
    vocab = text_config(base).vocab_size

    def keep(hidden: Tensor, _: Any) -> tuple[Tensor, int]:
        entered.append(hidden)
        return hidden, vocab

    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]], device=device) % vocab
    with evaluating(base), StandIn(head_module(base), type(base).__name__, keep).in_place():
        base(input_ids=ids, attention_mask=torch.ones_like(ids))
    first, other = entered[0][:, :2].double()
    tolerance = 1e-5 if entered[0].dtype in (torch.float32, torch.float64) else 2**-8
    return bool((first - other).norm() > tolerance * first.norm())
