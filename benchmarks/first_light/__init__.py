"""The first minutes on a GPU: is every kernel right on it, and how far from its limits is each?

`run.py` has the sections in their order, `sections.py` runs each as a process of its own, and
`results.py` keeps what they find. What is checked and timed is in the other files, one subject
each; what only a GPU can do, and what stands in for it elsewhere, is all in `machine.py`.
"""
