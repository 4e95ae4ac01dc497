"""`Unpack`, by which `**options` have the names and types of a TypedDict.

It is in typing from Python 3.11 on. Before, type checkers have it from typing_extensions; nothing
reads it at run time, where it can be anything.
"""

import sys
from typing import TYPE_CHECKING

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:

    class Unpack:
        """Stands for typing's."""

        def __class_getitem__(cls, item: object) -> object:
            return item
