"""What a model does to the logits of its head, told from what it makes of known numbers.

Most models return what their head makes. Some multiply it (Cohere, Granite), cap it (Gemma), add to
it (BART) or rule tokens out (Chameleon); so do hooks and patches. All of these are

    softcap·tanh(scale·x / softcap) + offset,

with an offset for each word that is -inf, or the lowest number of a dtype, where a word is ruled
out. Three rows of numbers are sent where logits would go. What becomes of the row of zeros is the
offset; scale and softcap are fitted to the second row, whose numbers reach from 2^-12 to 128; the
third row holds others, on which the fit must hold. A model that does anything else does not fit.

Dims: V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops.vocabulary_part import VocabularyPart
from fastrlhf.reference import capped_logits

# Anything below is a word that is ruled out, not a logit.
_RULED_OUT = torch.finfo(torch.float16).min
_PRECISION = 1e-5


class LogitMap(NamedTuple):
    """From the logits of a head to those of its model."""

    scale: float = 1.0
    softcap: float | None = None
    offset: Tensor | None = None  # (V,)

    def __call__(self, logits: Tensor) -> Tensor:
        made = capped_logits(logits, self.softcap, self.scale)
        return made if self.offset is None else made + self.offset

    def agrees(self, rows: Tensor, made: Tensor) -> bool:
        """Whether a model made of some rows (R, V) what this map does."""
        want = self(rows)
        if made.shape != want.shape:
            return False
        logits = want > _RULED_OUT  # words that are ruled out only have to be so in both
        if bool(((made > _RULED_OUT) != logits).any()):
            return False
        error = torch.where(logits, (made - want).abs(), 0.0).amax(-1)
        size = torch.where(logits, want.abs(), 0.0).amax(-1)
        return bool((error <= _PRECISION * size).all())

    def of_columns(self, part: VocabularyPart | None) -> "LogitMap":
        """The same of some columns of the vocabulary."""
        if part is None or self.offset is None:
            return self
        return self._replace(offset=self.offset[part.columns])

    def folded_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias of a head whose logits are those of the model without an offset.

        Only for a map without both a softcap and an offset.
        """
        if self.offset is None:
            return bias
        offset = self.offset / self.scale
        return offset if bias is None else bias + offset.to(bias.device)


def known_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers to send in place of logits: (3, V), in fp32 or fp64."""
    word = torch.arange(vocab, dtype=torch.float64, device=device)
    # Multiples of irrational numbers, modulo 1: spread evenly over any range of words.
    even, other = (word * 0.6180339887498949 + 0.25) % 1, (word * 0.7548776662466927 + 0.75) % 1
    sign = torch.where(other < 0.5, -1.0, 1.0)
    rows = torch.stack((0 * word, sign * 2 ** (19 * even - 12), 100 * other - 50))
    # Numbers of 16 bits, for wrappers that round what a model returns (FSDP2's output_dtype).
    return rows.bfloat16().to(torch.promote_types(dtype, torch.float32))


def fit(rows: Tensor, made: Tensor) -> LogitMap | None:
    """Find the map by which a model made (3, V) numbers of the known rows; None: it is another."""
    if made.shape != rows.shape or bool(made.isnan().any()):
        return None
    offset = made[0]
    logits = offset > _RULED_OUT
    if bool((made == torch.inf).any()) or not bool(logits.any()):
        return None
    x, change = (row[logits].double() for row in (rows[1], made[1] - offset))
    noise = 4 * torch.finfo(made.dtype).eps * float(offset[logits].abs().max())
    scale, softcap = _slope(x, change, noise), None
    if scale is None:
        scale, softcap = _slope_and_cap(x, change, noise)
    if scale is None or not scale > 0:
        return None
    fitted = LogitMap(
        _rounded(scale),
        None if softcap is None else _rounded(softcap),
        offset.clone() if bool((offset != 0).any()) else None,
    )
    return fitted if fitted.agrees(rows, made) else None


def _slope(x: Tensor, change: Tensor, noise: float) -> float | None:
    """Fit a line through 0 and return its slope; None where no line fits."""
    slope = (x @ change) / (x @ x)
    error = (change - slope * x).abs().max()
    return float(slope) if error <= _PRECISION * change.abs().max() + noise else None


def _slope_and_cap(
    x: Tensor, change: Tensor, noise: float
) -> tuple[float, float] | tuple[None, None]:
    """Fit softcap·tanh(scale·x / softcap) by Gauss's and Newton's method, in logarithms, in which
    small numbers count as much as large ones.
    """
    clear = (change.abs() > 1e3 * noise) & (x != 0)
    x, change = x[clear].abs(), change[clear] * x[clear].sign()
    if x.numel() < 2 or not bool((change > 0).all()):
        return None, None
    cap, scale = change.max().log(), (change / x)[x.argmin()].log()
    for _ in range(50):
        u = (scale - cap).exp() * x
        # The derivative of ln change by ln scale: 1 where nothing is capped.
        seen = torch.where(u < 1e-4, 1.0, 2 * u / torch.sinh(2 * u.clamp(max=300)))
        missing = change.log() - cap - torch.tanh(u).log()
        by = torch.stack((seen, 1 - seen))
        step = torch.linalg.lstsq(by @ by.T, (by @ missing).unsqueeze(1)).solution[:, 0]
        if not bool(step.isfinite().all()):
            return None, None
        step = step.clamp(-1, 1)
        scale, cap = scale + step[0], cap + step[1]
        if bool((step.abs() < 1e-12).all()):
            break
    return float(scale.exp()), float(cap.exp())


def _rounded(number: float) -> float:
    """Round to six digits, which are those of the model's config, where that changes the number by
    less than fp32 resolves.
    """
    short = float(f"{number:.6g}")
    return short if abs(short - number) <= 2e-7 * abs(number) else number
