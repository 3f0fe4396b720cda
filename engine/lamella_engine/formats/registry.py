"""All packed formats, by name."""

from __future__ import annotations

from lamella_engine.errors import OptionError
from lamella_engine.formats.format import Format
from lamella_engine.formats.four_bit import FourBit, fp4, nf4
from lamella_engine.formats.int8 import Int8
from lamella_engine.formats.lossless import Lossless

FORMATS: dict[str, Format] = {format.name: format for format in (nf4(), fp4(), Int8(), Lossless())}

CALIBRATED_FORMATS = tuple(name for name, format in FORMATS.items() if isinstance(format, FourBit))
"""Those that `calibrated_rounding` can pack in."""


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in FORMATS:
        raise OptionError(f"{name!r} is no packed format; there are {', '.join(FORMATS)}")
    return FORMATS[name]
