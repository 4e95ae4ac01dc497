"""Other people's trainers on fastrlhf's kernels: `from fastrlhf.integrations import trl`."""
