"""A record of what lazy logits were used for, by the line of code that called a function on them.

`tensor` notes what was computed without logits, `building` what needed them; `lazy_report` shows
both, so that a user finds the lines that still build logits.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

_logger = logging.getLogger("fastrlhf.lazy")
_PASSED_OVER = tuple(str(Path(x).parent) for x in (torch.__file__, __file__))


@dataclass
class LazyUse:
    """The use that one line of code made of lazy logits.

    Example:
        >>> fastrlhf.LazyUse(site="train.py:12", what="argmax", plan="1G", calls=1, tokens=3)
        LazyUse(site='train.py:12', what='argmax', plan='1G', calls=1, tokens=3, bytes=0)
    """

    site: str  # file:line of the innermost caller outside of PyTorch and this library
    what: str  # the function that was fused, or for which the logits were built
    plan: str  # matmuls of the vocabulary, forward and backward together; "" for what was built
    calls: int = 0
    tokens: int = 0  # of all calls
    bytes: int = 0  # of logits that were built


@dataclass(frozen=True)
class LazyReport:
    """The uses of lazy logits that were fused, and those that built them; `print` it for a table.

    Example:
        >>> report = fastrlhf.LazyReport(fused=(), built=())
        >>> print(report)
        no lazy logits were used
    """

    fused: tuple[LazyUse, ...]
    built: tuple[LazyUse, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        rows = [("", "what", "plan", "calls", "tokens", "bytes built", "where")]
        for name, uses in (("fused", self.fused), ("built", self.built)):
            rows += [
                (name, x.what, x.plan, f"{x.calls:,}", f"{x.tokens:,}", f"{x.bytes:,}", x.site)
                for x in uses
            ]
        if len(rows) == 1:
            yield "no lazy logits were used"
            return
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()


class Cost(NamedTuple):
    """How many matmuls of the vocabulary something costs, forward and backward together.

    The unit is G, one matmul of all the tokens with the head's weight. Which field applies depends
    on whether a gradient is wanted, and whether the head is trained.
    """

    no_gradient: int
    frozen_head: int
    trained_head: int
    of_statistics: bool = False  # from statistics that all questions on the same tokens share

    def plan(self, *, differentiable: bool, trained: bool) -> str:
        """The cost that applies, as text such as "4G"."""
        kinds = {(True, True): self.trained_head, (True, False): self.frozen_head}
        return f"{kinds.get((differentiable, trained), self.no_gradient)}G"


_fused: dict[tuple[str, str, str], LazyUse] = {}
_built: dict[tuple[str, str, str], LazyUse] = {}


def lazy_report(*, clear: bool = False) -> LazyReport:
    """Tell what was done with lazy logits so far, of all models of this process.

    Args:
        clear: forget it afterwards, and warn again of sites that build.

    Returns:
        LazyReport, whose `fused` and `built` hold a LazyUse for each line of code and function, and
        whose text is a table. `plan` counts matmuls of the vocabulary, in units of the tokens:
        "1G" where nothing needs a gradient, "2G" for a frozen head, "3G" for a trained one whose
        loss is known in the forward, "4G" where the loss comes later; "0G" for what was computed
        along with something else on the same tokens, or concerns only a few words.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1))
        >>> _ = fastrlhf.lazy_report(clear=True)
        >>> with fastrlhf.lazy_logits(model):
        ...     best = model(torch.tensor([[3, 1, 4]])).logits.argmax(-1)
        >>> [(use.what, use.plan, use.tokens) for use in fastrlhf.lazy_report().fused]
        [('argmax', '1G', 3)]
    """
    report = LazyReport(tuple(_fused.values()), tuple(_built.values()))
    if clear:
        _fused.clear()
        _built.clear()
    return report


def note_fused(what: str, plan: str, tokens: int) -> None:
    """Remember that something of some tokens was computed without their logits."""
    use = _use(_fused, what, plan)
    use.calls += 1
    use.tokens += tokens


def note_built(what: str, tokens: int, size: int) -> None:
    """Remember that logits were built, and say so, once for each line of code."""
    known = len(_built)
    use = _use(_built, what, "")
    use.calls += 1
    use.tokens += tokens
    use.bytes += size
    if len(_built) > known:
        _logger.warning(
            "%s: %s builds the logits, %s MB, which fastrlhf.lazy_logits left out: it is not among "
            "the functions that are fused (said once for this line)",
            use.site, what, f"{size / 1e6:,.1f}",
        )  # fmt: skip


def name_of(func: Any) -> str:
    """Return the usual name of a function of PyTorch, or of an attribute."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", name)
    return name


def _use(uses: dict[tuple[str, str, str], LazyUse], what: str, plan: str) -> LazyUse:
    site = _site()
    return uses.setdefault((site, what, plan), LazyUse(site, what, plan))


def _site() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
