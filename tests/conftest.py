"""Shared fixtures live in `tests/fixtures`, one module a noun."""

import signal

# Under a shell that ignores SIGINT for its background jobs, the programs that tests interrupt would ignore it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.fixtures.models", "tests.fixtures.servers"]
