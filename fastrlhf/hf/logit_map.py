"""Find out what a model does to the logits of its head, by sending known numbers in their place.

Most models return the logits that their head makes. Some multiply them (Cohere, Granite), cap them
(Gemma), add to them (BART) or rule words out (Chameleon). Hooks and patches may do the same. All of
these are of the form

    softcap·tanh(scale·x / softcap) + offset,

with an offset for each word. Where a word is ruled out, its offset is -inf, or the lowest number of
a dtype.

Three rows of known numbers are sent in place of logits. The first is zeros, and what the model
makes of it is the offset. Scale and softcap are fitted to the second row, whose numbers reach from
2^-12 to 128. The third row has other numbers, for which the fit must hold too. If it does not, the
model does something else.

Dims: V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops.vocabulary_part import VocabularyPart
from fastrlhf.reference import capped_logits

# A number that is not above this says that a word is ruled out, and is not a logit.
_RULED_OUT = torch.finfo(torch.float16).min
_PRECISION = 1e-5


class LogitMap(NamedTuple):
    """The map from the logits of a head to those of its model."""

    scale: float = 1.0
    softcap: float | None = None
    offset: Tensor | None = None  # (V,)

    def __call__(self, logits: Tensor) -> Tensor:
        made = capped_logits(logits, self.softcap, self.scale)
        return made if self.offset is None else made + self.offset

    def agrees(self, rows: Tensor, made: Tensor) -> bool:
        """Whether this map turns some rows (R, V) into what the model made of them."""
        want = self(rows)
        if made.shape != want.shape:
            return False
        logits = want > _RULED_OUT  # where a word is ruled out in both, the numbers may differ
        if bool(((made > _RULED_OUT) != logits).any()):
            return False
        error = torch.where(logits, (made - want).abs(), 0.0).amax(-1)
        size = torch.where(logits, want.abs(), 0.0).amax(-1)
        return bool((error <= _PRECISION * size).all())

    def of_columns(self, part: VocabularyPart | None) -> "LogitMap":
        """Restrict the map to a rank's columns of the vocabulary."""
        if part is None or self.offset is None:
            return self
        return self._replace(offset=self.offset[part.columns])

    def folded_bias(self, bias: Tensor | None) -> Tensor | None:
        """Add the offset to the bias of the head, so that the rest of the map has no offset.

        The map must not have both a softcap and an offset.
        """
        if self.offset is None:
            return bias
        offset = self.offset / self.scale
        return offset if bias is None else bias + offset.to(bias.device)


def known_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the numbers (3, V) that are sent in place of logits, in fp32 or fp64."""
    word = torch.arange(vocab, dtype=torch.float64, device=device)
    # Multiples of irrational numbers modulo 1 are spread evenly over any range of words.
    even, other = (word * 0.6180339887498949 + 0.25) % 1, (word * 0.7548776662466927 + 0.75) % 1
    sign = torch.where(other < 0.5, -1.0, 1.0)
    rows = torch.stack((0 * word, sign * 2 ** (19 * even - 12), 100 * other - 50))
    # All numbers are exact in 16 bits, since wrappers may round what a model returns (FSDP2's
    # output_dtype).
    return rows.bfloat16().to(torch.promote_types(dtype, torch.float32))


def fit(rows: Tensor, made: Tensor) -> LogitMap | None:
    """Find the map by which a model turned the known rows into `made` (3, V); None: no map fits."""
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
    """Fit softcap·tanh(scale·x / softcap) by the Gauss-Newton method. It is applied to logarithms,
    so that small numbers count as much as large ones.
    """
    clear = (change.abs() > 1e3 * noise) & (x != 0)
    x, change = x[clear].abs(), change[clear] * x[clear].sign()
    if x.numel() < 2 or not bool((change > 0).all()):
        return None, None
    cap, scale = change.max().log(), (change / x)[x.argmin()].log()
    for _ in range(50):
        u = (scale - cap).exp() * x
        # The derivative of ln change with respect to ln scale: 1 where nothing is capped.
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
    """Round to six digits, if that changes the number by less than fp32 resolves: the rounded one
    is then the number in the model's config.
    """
    short = float(f"{number:.6g}")
    return short if abs(short - number) <= 2e-7 * abs(number) else number
