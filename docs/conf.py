"""How Sphinx makes a website of these pages and of the docstrings: `make docs`.

The pages are Markdown, which reads as well where a repository is shown; those of the reference are
reStructuredText, as the docstrings are. Nothing is fetched while the site is made, nor by who reads
it. `docstrings.py` and `public_names.py`, beside this file, are the extensions of our own.
"""

import sys
from pathlib import Path

import fastrlhf

sys.path.insert(0, str(Path(__file__).parent))

project = "fastrlhf"
author = "The fastrlhf authors"
version = release = fastrlhf.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "docstrings",
    "public_names",
]
smartquotes = False  # "auto" is a value

html_theme = "furo"
html_title = f"fastrlhf {version}"
html_show_sourcelink = False

# Headings can be linked to, by the anchors that they have where a repository is shown.
myst_heading_anchors = 4

# In docstrings, `name` in single backticks is code.
default_role = "literal"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Every link has to lead somewhere. Types of other packages, in signatures, have no page here.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]

# Copied examples are without prompts and outputs.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
