"""Code that is the name of something public becomes a link to its entry in the reference."""

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import fastrlhf


class LinkPublicNames(SphinxTransform):
    """Wrap such code in a reference, which the Python domain resolves."""

    default_priority = 400  # after the parsers, before Sphinx collects what is referred to

    def apply(self) -> None:
        """Do so throughout a page."""
        for code in list(self.document.findall(nodes.literal)):
            name = code.astext().removesuffix("()").removeprefix("fastrlhf.")
            if name in fastrlhf.__all__ and not isinstance(code.parent, nodes.reference):
                link = addnodes.pending_xref(
                    "", refdomain="py", reftype="obj", reftarget=f"fastrlhf.{name}", refwarn=True
                )
                code.replace_self(link)
                link += code


def setup(app: Sphinx) -> None:
    """Have it done to each page."""
    app.add_transform(LinkPublicNames)
