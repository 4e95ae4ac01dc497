"""What is asked about tokens: keywords that do not depend on how their logits are made."""

from collections.abc import Iterable
from typing import NamedTuple, TypedDict

from fastrlhf.reference import FURTHER_STATS

from .checks import check_bool, check_ignore_index, check_names


class TokenQuestion(NamedTuple):
    """Which statistics of which tokens are asked for; `checked_question` makes it."""

    ignore_index: int
    entropy: bool
    entropy_grad: bool  # whether the entropy has a gradient, where it is asked for
    with_stats: tuple[str, ...]  # names of further statistics
    lse: bool  # whether the lse is used; if not, the logit of a token's only kept id is not read

    @property
    def of_gradient(self) -> "TokenQuestion":
        """The question without statistics that have no gradient, for logits that are made again."""
        return self._replace(entropy=self.entropy and self.entropy_grad, with_stats=())

    @property
    def yes_and_no(self) -> tuple[bool, ...]:
        """The question as answers yes or no, which ranks compare."""
        return self.entropy, self.entropy_grad, *(x in self.with_stats for x in FURTHER_STATS)


class QuestionKeywords(TypedDict, total=False):
    """The keywords of `checked_question` that have a default."""

    entropy: bool
    entropy_grad: bool
    with_stats: Iterable[str]
    lse: bool


def checked_question(
    ignore_index: int,
    *,
    entropy: bool = False,
    entropy_grad: bool = True,
    with_stats: Iterable[str] = (),
    lse: bool = True,
) -> TokenQuestion:
    """Check the keywords.

    Raises:
        TypeError, ValueError: a keyword that does not fit, by its public name.
    """
    check_bool("entropy", entropy)
    check_bool("entropy_grad", entropy_grad)
    names = check_names("with_stats", with_stats, FURTHER_STATS)
    return TokenQuestion(check_ignore_index(ignore_index), entropy, entropy_grad, names, lse)
