"""Whether a change of the library changes a bit of what it computes.

`calls.py` has a call of each public function with many options, `record.py` makes a digest of what
each returns and of its gradients, also of the random cases of `support.fuzz`, and `__main__.py`
compares two states of the library on one machine. There is no file of digests to compare with: the
bits of a processor are its own.
"""
