"""Fetching a model from a peer on loopback beside a plain copy of the same bytes, by turns in one run.

    python -m benchmarks.peer_fetch --store DIRECTORY --model NAME --turns 3 --out FILE.json

The peer is a process of its own. A fetch hashes and syncs every file; `cp` does neither, and `copy and hash` is `cp`
followed by `sha256sum` of what it wrote: what a copy would take whose result is as well known.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.json_file import write_json
from benchmarks.machine import Bystanders, machine_facts
from lamella_engine.peer_address import Peers
from lamella_engine.shard_store import ShardStore


def main(arguments: Sequence[str] | None = None) -> int:
    """Take turns, print the medians, and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    bystanders = Bystanders()
    theirs = ShardStore(options.store)
    manifest = theirs.manifest(options.model)
    source = theirs.build_directory(manifest)
    nbytes = sum(record.nbytes for record in manifest.files)
    command = [
        sys.executable,
        "-m",
        "lamella_engine",
        "share",
        "--listen",
        "127.0.0.1:0",
        "--store",
        str(options.store),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sharing:
        try:
            assert sharing.stdout is not None
            address = sharing.stdout.readline().rpartition(" on ")[2].strip()

            def fetch(place: Path) -> None:
                ShardStore(place, peers=Peers.named([address])).ensure(options.model, offline=True)

            ways: dict[str, Callable[[Path], None]] = {
                "fetch": fetch,
                "cp": lambda place: _cp(source, place),
                "cp and sha256sum": lambda place: _cp_and_hash(source, place),
            }
            rates = _turns(ways, options.turns, nbytes)
        finally:
            sharing.terminate()
    result = {
        "command": "python -m benchmarks.peer_fetch " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "machine": {**machine_facts(options.store, "cpu"), "others_busy_cores": bystanders.busy_cores()},
        "bytes": nbytes,
        "megabytes_per_s": rates,
        "median_megabytes_per_s": {way: round(statistics.median(found)) for way, found in rates.items()},
    }
    print(result["median_megabytes_per_s"], "MB/s,", nbytes, "bytes")
    if options.out is not None:
        write_json(options.out, result)
    return 0


def _turns(ways: dict[str, Callable[[Path], None]], turns: int, nbytes: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, carry_out in ways.items():
            with tempfile.TemporaryDirectory(prefix="lamella-peer-") as place:
                began = time.perf_counter()
                carry_out(Path(place) / "to")
                rates[way].append(round(nbytes / (time.perf_counter() - began) / 1e6, 1))
    return rates


def _cp(source: Path, place: Path) -> None:
    place.mkdir()
    subprocess.run(["cp", "-r", str(source), str(place)], check=True, timeout=3600)


def _cp_and_hash(source: Path, place: Path) -> None:
    _cp(source, place)
    program = shutil.which("sha256sum")
    assert program is not None, "sha256sum is part of every Linux"
    files = [str(path) for path in (place / source.name).iterdir()]
    subprocess.run([program, *files], check=True, timeout=3600, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
