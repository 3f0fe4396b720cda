"""Logging of a worker process: one line an event on stderr, and libraries quiet where we say the same better."""

from __future__ import annotations

import logging
import warnings


def set_up_logging(*, is_verbose: bool) -> None:
    """Set up the root logger; call it once, when the process starts."""
    logging.basicConfig(
        level=logging.DEBUG if is_verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("celery.worker.strategy", "celery.bootsteps", "kombu", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("celery.app.trace").setLevel(logging.ERROR)  # it warns of each job that is given back
    # The danger it warns of is pickle in messages; ours are JSON only.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    # It announces another default of a setting that `app` sets.
    warnings.filterwarnings("ignore", message=r"\s*In Celery 5\.1 we introduced an optional breaking change")
