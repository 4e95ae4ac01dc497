"""Complete runs, from text to a trained model: `python -m fastrlhf.recipes.<name>`.

    sft        supervised fine-tuning                 sft.py, reviews.py
    reward     a reward model from rankings           reward.py, rewards.py
    ppo        RLHF with a critic                     ppo.py, critics.py
    dpo, demo  from preferences, without a reward     dpo.py, preference.py
    grpo       groups instead of a critic             grpo.py, groups.py
    trpo       an exact bound on each step's KL       trpo.py
    distill    a smaller model from a larger one      distill.py
    pipeline   sft, reward and ppo in one go          pipeline.py
    frontier   reward against KL, all methods         frontier.py, best_of_n.py

Each recipe's file can be read from top to bottom: first its options, then `train`, then the step of
training that the recipe is about. The recipes share `settings` (options), `run` (devices,
checkpoints, logs), `rollout` (sampling, useful in any trainer), `evaluation` (held-out prompts),
`models` and `curves`.
"""

import logging

# peft imports bitsandbytes, which on some processors warns that one of its kernels is missing. No
# recipe uses that kernel, so the warning is hidden.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in str(record.msg)
)
