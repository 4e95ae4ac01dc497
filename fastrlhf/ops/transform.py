"""Scale, softcap and temperature, which make effective logits of a head's, and their checks.

The softmax is taken of the effective logits; all statistics and losses are defined by these.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.reference import ROWS, Layout, accumulation_dtype

from .backend import is_batched
from .checks import check_floating, check_positive, check_same_device
from .tracing import being_traced, replaced

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Transform(NamedTuple):
    """softcap·tanh(scale·x / softcap) / temperature, without tanh where there is no softcap.

    Its fields are, in this order, arguments of the operators on logits.
    """

    token_temperature: Tensor | None  # one for each token; `temperature` is then 1
    temperature: float
    softcap: float | None
    scale: float

    @property
    def of_rows(self) -> float | Tensor:
        """The temperature of all tokens, or that of each."""
        return self.temperature if self.token_temperature is None else self.token_temperature

    def flat(self, dtype: torch.dtype) -> "Transform":
        """Flatten temperatures to (N,), in the dtype in which logits of `dtype` are computed."""
        tokens = self.token_temperature
        if tokens is None:
            return self
        flat = tokens.reshape(-1).to(accumulation_dtype(dtype)).contiguous()
        return replaced(self, token_temperature=flat)


# The fields of `Transform` in the schema of an operator on logits.
TRANSFORM = "Tensor? token_temperature, float temperature, float? softcap, float scale"


def checked_transform(
    temperature: float | Tensor, softcap: float | None, scale: float, targets: Tensor
) -> Transform:
    """Check the options of a transform and give every token of `targets` its temperature.

    Raises:
        TypeError, ValueError: an option that is not a positive number, or a tensor of temperatures
            that does not fit or requires a gradient.
    """
    token_temperature = None
    if isinstance(temperature, Tensor):
        token_temperature = token_temperatures(temperature, targets)
        temperature = 1.0
    return Transform(
        token_temperature,
        check_factor("temperature", temperature),
        None if softcap is None else check_factor("softcap", softcap),
        check_factor("scale", scale),
    )


def check_factor(name: str, value: float) -> float:
    """Return a number as float. Raise TypeError for anything else, ValueError unless it is a
    positive one that fp32 holds, in which most logits are transformed.
    """
    number = check_positive(name, value)
    if not _SMALLEST <= number <= _LARGEST:
        raise ValueError(f"{name}: expected a number in [1.2e-38, 3.4e38], got {value}")
    return number


def check_temperatures_on_host(tokens: Tensor | None, live: Tensor) -> None:
    """Raise ValueError for a temperature of a live token that is not positive and finite, on the
    CPU only: elsewhere the host would have to wait.
    """
    unknown = being_traced() or is_batched(tokens, live)
    if tokens is None or live.device.type != "cpu" or unknown:
        return
    wanted = tokens[live]
    wrong = ~((wanted > 0) & (wanted < torch.inf))
    if wrong.any():
        worst = wanted[wrong][0].item()
        raise ValueError(f"temperature: expected positive finite temperatures, got {worst}")


def flat_temperature(
    tokens: Tensor | None, temperature: float, dtype: torch.dtype
) -> float | Tensor:
    """Return the temperature of all tokens, or those of each as a contiguous (N,)."""
    return temperature if tokens is None else tokens.reshape(-1).to(dtype).contiguous()


def token_temperatures(temperature: Tensor, targets: Tensor) -> Tensor:
    """Give every token of `targets` its temperature, from a tensor that broadcasts to them.

    Raises:
        TypeError, ValueError: one that does not, or requires a gradient.
    """
    check_floating("temperature", temperature)
    check_same_device("temperature", temperature, "the tokens", targets)
    if temperature.requires_grad:
        raise ValueError(
            "temperature: expected a tensor without gradient, got one that requires it"
        )
    if temperature.ndim == 1 and targets.ndim == 2:
        # One for each sequence, as advantages are: never one for each position because there
        # happen to be as many.
        if temperature.shape != targets.shape[:1]:
            raise ValueError(
                f"temperature: expected shape {tuple(targets.shape[:1])} (one for each sequence), "
                f"or {tuple(targets.shape)}, got {tuple(temperature.shape)}"
            )
        temperature = temperature.unsqueeze(1)
    if temperature.ndim == 1 and targets.ndim > 2:
        raise ValueError(
            f"temperature: expected a number, or as many dimensions as {tuple(targets.shape)}, got "
            f"{tuple(temperature.shape)}"
        )
    missing = targets.ndim - temperature.ndim
    sizes = targets.shape[max(missing, 0) :]
    if missing < 0 or any(
        n not in (1, size) for n, size in zip(temperature.shape, sizes, strict=True)
    ):
        raise ValueError(
            f"temperature: expected a number or a tensor that broadcasts to {tuple(targets.shape)} "
            f"(one for each token), got {tuple(temperature.shape)}"
        )
    return temperature.expand(targets.shape)


def temperatures_of_layout(
    temperature: float | Tensor, tokens: Tensor, layout: Layout
) -> float | Tensor:
    """Give packed tokens the temperatures (B,) of their sequences; leave all else as it is."""
    if layout is ROWS or not isinstance(temperature, Tensor):
        return temperature
    of_tokens = temperature.shape == tokens.shape
    if of_tokens or tuple(temperature.shape) != (layout.sequences(tokens),):
        return temperature
    return layout.spread(temperature).view(tokens.shape)
