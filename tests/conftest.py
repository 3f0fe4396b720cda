"""Shared fixtures live in `tests/fixtures`, one module a noun."""

pytest_plugins = ["tests.fixtures.models", "tests.fixtures.servers"]
