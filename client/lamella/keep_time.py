"""How long what belongs to an ended job is kept: prompt, tokens, outcome; afterwards nothing of it is left.

Owns the setting LAMELLA_KEEP_S and its bounds. Whoever ends a job starts its time to live: the worker with its own
setting, a client that cancels a waiting job with this one. Neighbour: `keys` (which carries it to the scripts).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from lamella.errors import ConfigError
from lamella.keys import FINISHED_TTL_S

KEEP_VARIABLE = "LAMELLA_KEEP_S"
LEAST_KEEP_S = 1
MOST_KEEP_S = 90 * 24 * 3600


def resolve_keep_s(keep_s: int | None, environ: Mapping[str, str] | None = None) -> int:
    """Return the seconds to keep an ended job: the argument, else LAMELLA_KEEP_S, else six hours.

    Raises:
        ConfigError: it is not a whole number of seconds within the bounds.
    """
    given: object = keep_s
    source = "keep_s"
    if given is None:
        given, source = (os.environ if environ is None else environ).get(KEEP_VARIABLE) or FINISHED_TTL_S, KEEP_VARIABLE
    if isinstance(given, str) and given.isascii() and given.isdecimal() and len(given) < 12:
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int) or not LEAST_KEEP_S <= given <= MOST_KEEP_S:
        raise ConfigError(f"{source} is {given!r}; use a whole number of seconds from {LEAST_KEEP_S} to {MOST_KEEP_S}")
    return given
