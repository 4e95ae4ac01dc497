"""`Unpack`, by which `**options` have the names and types of a TypedDict.

It is in typing from Python 3.11 on; nothing reads it at run time, so before it can be anything.
"""

import sys

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:

    class Unpack:
        """Stands for typing's."""

        def __class_getitem__(cls, item: object) -> object:
            return item
