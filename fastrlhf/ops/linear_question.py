"""The question about tokens: keywords that do not depend on how their logits are made.

`linear_token_stats.py`, `linear_loss.py` and `scorer.py` make one from their keywords,
`linear_problem.py` puts it beside the tensors, and `linear_plans.py` answers it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict

from fastrlhf.reference import FURTHER_STATS

from .checks import check_bool, check_ignore_index, check_names
from .tracing import replaced


class TokenQuestion(NamedTuple):
    """Which statistics of which tokens are asked for: as given, until it is `checked`."""

    ignore_index: int
    entropy: bool = False
    entropy_grad: bool = True  # whether the entropy has a gradient, where it is asked for
    with_stats: Any = ()  # names of further statistics: an Iterable[str], a tuple once checked
    lse: bool = True  # whether it is used; if not, the logit of a token's only kept id is not read

    def checked(self) -> "TokenQuestion":
        """Check the keywords, and make a tuple of the names.

        Raises:
            TypeError, ValueError: a keyword that does not fit, by its public name.
        """
        check_bool("entropy", self.entropy)
        check_bool("entropy_grad", self.entropy_grad)
        names = check_names("with_stats", self.with_stats, FURTHER_STATS)
        return replaced(self, ignore_index=check_ignore_index(self.ignore_index), with_stats=names)

    @property
    def of_gradient(self) -> "TokenQuestion":
        """The question without statistics that have no gradient, for logits that are made again."""
        return replaced(self, entropy=self.entropy and self.entropy_grad, with_stats=())

    @property
    def yes_and_no(self) -> tuple[bool, ...]:
        """The question as answers yes or no, which ranks compare."""
        return self.entropy, self.entropy_grad, *(x in self.with_stats for x in FURTHER_STATS)


class QuestionKeywords(TypedDict, total=False):
    """The fields of `TokenQuestion` that have a default, as keywords."""

    entropy: bool
    entropy_grad: bool
    with_stats: Iterable[str]
    lse: bool
