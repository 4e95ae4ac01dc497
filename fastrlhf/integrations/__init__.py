"""Patches that put other people's trainers on fastrlhf's kernels.

    trl             the trainers of TRL: `from fastrlhf.integrations import trl`
    transformers    `transformers.Trainer`
    replacements    how both put attributes of other modules in place, and back

trl_head has what TRL calls in place of its own functions, trl_foresight what its losses tell
beforehand.
"""
