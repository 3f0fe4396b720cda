"""What the garbage collector need not look at: everything that start-up made and that lives as long as the process.

Owns that one step. A full collection stops every thread for as long as it takes to look at all objects. The modules of
a worker are seventy thousand of them, 35 ms, and those of an engine's process 400 thousand, 200 ms (one quiet core,
Python 3.11), in which no token is delivered and no sweep is begun. Worker, engine process and gateway call it; a
library in somebody's program must not.
"""

from __future__ import annotations

import gc


def spare_started() -> None:
    """Collect once, then leave what is there out of all later collections; what it points to is kept in any case."""
    gc.collect()
    gc.freeze()
