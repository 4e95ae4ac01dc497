"""Complete runs, from text to a trained model.

`python -m fastrlhf.recipes.demo` is the one to try first.
"""
