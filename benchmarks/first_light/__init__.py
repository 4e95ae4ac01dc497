"""First light: the first minutes on a GPU.

Is every kernel correct on this GPU, and how far is each from the limits of the hardware? The
command is `python benchmarks/gpu.py --first-light`. `run.py` has the sections in their order,
`sections.py` runs each as a process of its own, and `results.py` collects their findings. The other
files contain the checks and timings, one subject each. `machine.py` contains everything that only a
GPU can do, with a substitute for machines that have none.
"""
