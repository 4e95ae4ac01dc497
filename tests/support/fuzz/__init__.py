"""Random calls of every public function, judged by formulas written a second time.

`draw.py` makes hostile tensors from a seed, `formulas.py` says in plain PyTorch what the docstrings
say, the files `cases_of_*.py` put a call and its formula together, `cases.py` lists them, and
`judge.py` compares: one seed is one case.
"""
