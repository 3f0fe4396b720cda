"""What the garbage collector need not look at: everything that start-up made and that lives as long as the process.

Owns that one step. A full collection stops every thread for as long as it takes to look at all objects, and the modules
of a worker alone are seventy thousand of them: 25 ms and more, in which no token is delivered and no sweep is begun.
"""

from __future__ import annotations

import gc


def spare_started() -> None:
    """Collect once, then leave what is there out of all later collections; what it points to is kept in any case."""
    gc.collect()
    gc.freeze()
