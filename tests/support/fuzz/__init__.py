"""Random calls of every public function, judged by formulas written a second time.

`draw.py` makes hostile tensors from a seed, `formulas.py` says in plain PyTorch what the docstrings
say, `cases.py` puts a call and its formula together, and `judge.py` compares: one seed is one case.
"""
