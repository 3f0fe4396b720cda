"""What kernels have to know of a blockwise format: its name, and the table of its codes if it has one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockKernel:
    """A blockwise format; without a table, codes are whole numbers of eight bits."""

    name: str
    table: tuple[float, ...] = ()
