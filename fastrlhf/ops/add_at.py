"""Add to rows that are found by number, in the same order at each run.

Used where several tokens add to one row: in `head_gradients.py`, `shared_targets.py`,
`shared_slopes.py`, `kept_logits.py` and `weighted_rows.py`.
"""

from torch import Tensor


def add_at(total: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Add values (n, ...) to rows of a total, in their order: to one row perhaps several."""
    if total.device.type == "cpu":
        return total.index_add_(0, place, values)
    return total.index_put_((place,), values, accumulate=True)  # sorts, and takes no atomics
