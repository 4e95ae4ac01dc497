"""From a seed to a verdict."""

import os
import traceback
import warnings

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch

from .cases import MAKERS
from .draw import Draw
from .judge import Verdict, judge


class Result(Verdict):
    """A verdict, and whose it is."""

    name = ""


def run(seed: int) -> Result:
    """Make the case of a seed and judge it; whatever raises is a failure: its input is legal."""
    draw = Draw(seed)
    result = Result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of the strides of a gradient
        try:
            case = draw.of(*MAKERS)(draw)
            result.name = case.name
            verdict = judge(case, draw.generator)
            result.failure, result.fragile = verdict.failure, verdict.fragile
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(place.filename)}:{place.lineno}"
            result.failure = f"{type(error).__name__} at {where}: {str(error)[:200]}"
    return result


torch.set_num_threads(1)
