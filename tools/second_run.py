"""Runs pytest, and gives the few tests that failed a second run, alone; those that pass then are called unsteady.

Owns what a failure of the suite means: up to MAX_FAILURES tests are run once more, with nothing beside them, and named
loudly where they pass. More of them, a second failure, a run that was broken off and tests that cannot be collected
fail at once. Which tests run, and how many side by side, is said by the arguments. Neighbour: `Makefile`
(``make pytest``).

    python -m tools.second_run -n 3 --dist loadfile -m "not timing"      all arguments are pytest's
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MAX_FAILURES = 3
_TESTS_FAILED = 1  # pytest's exit status where tests ran and some failed; other statuses say that the run is no result
_ALONE = ("-n", "0", "--dist", "no")


def run(arguments: Sequence[str], directory: Path) -> int:
    """Run pytest in the working directory with `arguments`, twice where that is due; returns its exit status.

    Args:
        arguments: of pytest's command line; ``-n`` and ``--dist`` are overridden in the second run.
        directory: for pytest's record of what failed; empty.
    """
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={directory}"]
    status = subprocess.call([*command, *arguments])
    failed = _failed(directory)
    are_tests = all("::" in name for name in failed)  # and no files that could not be collected
    if status != _TESTS_FAILED or not are_tests or not 0 < len(failed) <= MAX_FAILURES:
        return status
    print(f"== pytest, a second run of {len(failed)} that failed, alone: {', '.join(failed)}", flush=True)
    status = subprocess.call([*command, *arguments, *_ALONE, "--last-failed", "--last-failed-no-failures", "none"])
    remaining = _failed(directory)
    for name in failed:
        if name not in remaining and status in (0, _TESTS_FAILED):
            print(f"unsteady: {name} failed beside other tests and passed alone; mend it", flush=True)
    return status


def _failed(directory: Path) -> list[str]:
    """The tests that failed in the last run, by pytest's own record; none if it has written none."""
    path = directory / "v" / "cache" / "lastfailed"
    return sorted(json.loads(path.read_text())) if path.exists() else []


def main(arguments: Sequence[str]) -> int:
    """Run the tests that `arguments` ask for; pytest's exit status, of the second run where there is one."""
    with tempfile.TemporaryDirectory(prefix="lamella-second-run-") as directory:
        return run(arguments, Path(directory))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
