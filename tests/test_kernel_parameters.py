"""All kernels take parameters in the order that `kernels/rows.py` states, in at most 100 lines."""

import ast
import itertools
from pathlib import Path

import pytest

KERNELS = {
    node.name: node
    for path in sorted(Path(__file__).parents[1].glob("kernels/*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}
SIZES = "rows vocab tiles splits words width blocks size tokens pairs sequences inner inner_other"
SIZES = {*SIZES.split(), "inner_p", "inner_q", "inner_u"}
TRANSFORM = ["token_temperature", "temperature", "softcap", "scale"]
CUT = ["LANES", "VEC", "LANE_STRIDE", "VEC_STRIDE"]


def kind(name: str) -> str:
    if name.isupper():
        return "constexpr"
    if name in TRANSFORM:
        return "transform"
    if "stride" in name:
        return "stride"
    return "size" if name in SIZES else "other"


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_come_in_one_order(kernel) -> None:
    names = [x.arg for x in KERNELS[kernel].args.args]
    kinds = [kind for kind, _ in itertools.groupby(names, kind)]
    # Tensors come first, and the operation's own numbers after the strides: both are "other".
    places = iter(("other", "size", "stride", "other", "transform", "constexpr"))
    assert all(x in places for x in kinds), kinds
    of_transform = [x for x in names if x in TRANSFORM]
    assert of_transform in ([], TRANSFORM)
    if "LANES" in names:
        first = names.index("LANES")
        assert names[first : first + 4] == CUT and names[first + 4 :] in ([], ["STAGES"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_read_at_once(kernel) -> None:
    node = KERNELS[kernel]
    assert node.end_lineno - node.lineno < 100


def test_these_are_all_kernels() -> None:
    assert len(KERNELS) == 17
