"""`Unpack`, by which `**options` have the names and types of a TypedDict: of typing from Python 3.11
on. Before, nothing reads it at run time, and so it can be anything.
"""

import sys

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:

    class Unpack:
        """Stands for typing's."""

        def __class_getitem__(cls, item: object) -> object:
            return item
