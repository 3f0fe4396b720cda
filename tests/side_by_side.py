"""How tests are spread over processes side by side: what shares real workers together, what takes long first.

A file's tests stay together, as with ``--dist loadfile``, since they share its fixtures; so do the files of SHARING.
The files of LONG are begun first, in this order, so that no process works on one of them while the others are done.
Which tests there are is not decided here, and without ``-n`` nothing of this applies but the order.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Files that use one fixture that lasts for the whole run and is costly: real workers.
SHARING = {
    "end_to_end/test_gateway.py": "the fleet of tests/end_to_end",
    "end_to_end/test_jobs.py": "the fleet of tests/end_to_end",
    "end_to_end/test_structured_jobs.py": "the fleet of tests/end_to_end",
    "end_to_end/test_workers.py": "the fleet of tests/end_to_end",
    "security/test_acl.py": "the worker of tests/security",
    "security/test_pull_rights.py": "the worker of tests/security",
    "security/test_secrets.py": "the worker of tests/security",
}
# Beyond half a minute each, most of it spent waiting, with some that compute among them.
LONG = (
    "end_to_end/test_workers.py",
    "engine/test_smollm2.py",
    "faults/test_engine_process.py",
    "faults/test_shards.py",
    "faults/test_engine_faults.py",
    "faults/test_worker_killed.py",
    "end_to_end/test_many_models.py",
    "faults/test_server_lost.py",
    "test_benchmarks.py",
    "faults/test_network.py",
    "test_repository_demo.py",
    "faults/test_clients.py",
    "end_to_end/test_chat_from_hub.py",
    "client/test_up.py",
    "security/test_acl.py",
    "worker/test_process.py",
)


def unit_of(nodeid: str) -> str:
    """What the test is run together with."""
    file = nodeid.split("::", 1)[0]
    return SHARING.get(file.removeprefix("tests/"), file)


class Spread(LoadFileScheduling):
    """Gives each process the next unit once it has all but done with its last."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Spread | None:
    """Spread units where whole files would be spread."""
    return Spread(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(trylast=True)  # behind the shuffling
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the units of LONG to the front; the others stay as they were shuffled."""
    ranks = {unit_of(f"tests/{file}"): rank for rank, file in reversed(list(enumerate(LONG)))}
    items.sort(key=lambda item: ranks.get(unit_of(item.nodeid), len(LONG)))
