"""What follows from the figures: limits, efficiency, ratios, and whether everybody chose the same tokens.

Pure arithmetic over one results object; measures nothing and writes no file. A limit is the time its lane needs alone,
with the bandwidth measured in the same run; the largest lane binds. Neighbours: `sweep` calls it after every stage,
`plot` draws what it adds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

REFERENCES = ("transformers", "accelerate-disk", "accelerate-ram", "airllm-no-cleanup", "airllm")


class Entrant(NamedTuple):
    """Anyone who chose tokens for the first prompt: a peer, or Lamella in a tier at some number of sequences."""

    name: str
    sequences: int
    token_ids: list[int]


class Difference(NamedTuple):
    """Where an entrant left the reference, and what both had chosen until then."""

    name: str
    position: int
    shared_ids: list[int]


def derive(results: dict[str, Any]) -> dict[str, Any]:
    """Everything that can be said from what has been measured so far."""
    tiers = {name: tier for name, tier in results.get("lamella", {}).items() if tier.get("sequences")}
    return {
        "lamella": {name: _tier_figures(tier, results) for name, tier in tiers.items()},
        "non_io_ms_per_layer": _overhead_ms(results),
        "against_peers": _against_peers(results),
        "tokens": compare_tokens(results),
    }


def limits(plan: dict[str, Any], sequences: int, model: dict[str, Any], lanes: dict[str, Any]) -> dict[str, float]:
    """Seconds each lane needs alone for one sweep that carries `sequences` tokens.

    `plan`: bytes a tier, as reported. `model`: swept_bytes, active_parameters. `lanes`: the calibration.
    """
    on_disk, in_ram = plan["bytes"]["disk"], plan["bytes"]["ram"]
    seconds: dict[str, float] = {}
    if on_disk and "disk" in lanes:
        seconds["disk"] = on_disk / lanes["disk"]["bytes_per_s"]
    if lanes.get("h2d_bytes_per_s"):
        seconds["bus"] = (on_disk + in_ram) / lanes["h2d_bytes_per_s"]
    if lanes.get("device_memory_bytes_per_s"):
        seconds["memory"] = model["swept_bytes"] / lanes["device_memory_bytes_per_s"]
    if lanes.get("operations_per_s"):
        seconds["compute"] = 2 * model["active_parameters"] * sequences / lanes["operations_per_s"]
    return seconds


def _tier_figures(tier: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for count, batch in tier["sequences"].items():
        seconds = limits(batch["plan"], int(count), results["model"], _lanes(batch, results))
        if not seconds:
            continue
        binding = max(seconds, key=lambda lane: seconds[lane])
        # Bandwidths of a bus or of memory are the best of some tries; that of a disk is a mean beside the sweeps.
        taken = batch["mean_s_per_sweep"] if binding == "disk" else batch["s_per_sweep"]
        figures[count] = {
            "limit_s_per_sweep": seconds[binding],
            "binding": binding,
            "lanes_s": seconds,
            "efficiency": seconds[binding] / taken,
            "bytes_per_token": {name: nbytes / int(count) for name, nbytes in batch["plan"]["bytes"].items()},
        }
    if "1" in tier["sequences"]:
        alone = tier["sequences"]["1"]["s_per_sweep"]
        figures["time_against_one"] = {
            count: batch["s_per_sweep"] / alone for count, batch in tier["sequences"].items() if count != "1"
        }
    return figures


def _lanes(batch: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The calibration; the disk as plain reads right before and after these sweeps found it, where there were any."""
    lanes = dict(results.get("calibration", {}))
    speeds = batch.get("plain_read_bytes_per_s")
    if speeds:
        lanes["disk"] = {"bytes_per_s": sum(speeds) / len(speeds)}
    return lanes


def _overhead_ms(results: dict[str, Any]) -> float | None:
    """Milliseconds a layer of a sweep that moves nothing; the arithmetic's own time is in it."""
    batch = results.get("lamella", {}).get("resident", {}).get("sequences", {}).get("1")
    return batch["s_per_sweep"] / results["model"]["layers"] * 1000 if batch else None


def _against_peers(results: dict[str, Any]) -> dict[str, Any]:
    """How many times longer each peer takes a token than Lamella takes for one sequence.

    What was cold is set beside peers whose file cache was dropped, the rest beside peers that kept it.
    """
    ratios: dict[str, Any] = {}
    for name, tier in results.get("lamella", {}).items():
        batch = tier.get("sequences", {}).get("1")
        if batch is None:
            continue
        is_cold = batch["label"] == "cold" or (batch["label"] == "unproven" and name == "disk")
        for peer, report in results.get("peers", {}).items():
            figure = report.get("sequences", {}).get("1", {}).get("dropped" if is_cold else "kept")
            if figure:
                ratios.setdefault(name, {})[peer] = figure["s_per_token"] / batch["s_per_sweep"]
    return ratios


def entrants(results: dict[str, Any]) -> list[Entrant]:
    """Everyone with tokens for the first prompt, the reference first; not who changes the weights."""
    found = []
    peers = {name: peer for name, peer in results.get("peers", {}).items() if "compression" not in peer}
    for name in sorted(peers, key=lambda peer: REFERENCES.index(peer) if peer in REFERENCES else len(REFERENCES)):
        for count, run in peers[name].get("sequences", {}).items():
            if run.get("token_ids"):
                found.append(Entrant(f"{name} N={count}", int(count), run["token_ids"][0]))
    for name, tier in results.get("lamella", {}).items():
        for count, batch in tier.get("sequences", {}).items():
            found.append(Entrant(f"lamella {name} N={count}", int(count), batch["token_ids"]))
    return sorted(found, key=lambda entrant: entrant.sequences != 1)  # stable: those of one sequence first


def compare_tokens(results: dict[str, Any]) -> dict[str, Any]:
    """Whether everyone's greedy tokens equal the reference's, over as many as both have."""
    everyone = entrants(results)
    if len(everyone) < 2:
        return {}
    reference, *others = everyone
    known = results.get("margins", {})
    compared: dict[str, Any] = {}
    for entrant in others:
        pairs = list(zip(reference.token_ids, entrant.token_ids, strict=False))
        position = next((place for place, (want, got) in enumerate(pairs) if want != got), None)
        compared[entrant.name] = {"tokens_equal": position is None, "compared": len(pairs)}
        if position is not None:
            compared[entrant.name] |= {
                "first_difference": position,
                "reference_token": pairs[position][0],
                "token": pairs[position][1],
                "top_two": known.get(str(position)),
            }
    return {"reference": reference.name, "compared": compared}


def differences(results: dict[str, Any]) -> list[Difference]:
    """Every first difference whose margin is worth looking up; one for each position."""
    everyone = entrants(results)
    found: dict[int, Difference] = {}
    for name, outcome in compare_tokens(results).get("compared", {}).items():
        if not outcome["tokens_equal"]:
            position = outcome["first_difference"]
            found.setdefault(position, Difference(name, position, everyone[0].token_ids[:position]))
    return list(found.values())


def table(results: dict[str, Any]) -> str:
    """The figures for a terminal: who, how many sequences, seconds, tokens a second, efficiency, proof, tokens."""
    lines = [f"{'who':<34}{'N':>4}{'s/token':>10}{'tok/s':>10}{'of limit':>10}  {'cache':<10}tokens equal"]
    for name, tier in results.get("lamella", {}).items():
        lines += _tier_rows(name, tier, results)
    for name, peer in results.get("peers", {}).items():
        for count, run in peer.get("sequences", {}).items():
            lines += _peer_rows(name, count, run, results)
        lines += [f"{name}: {peer['error']}"] if "error" in peer else []
    lines += [f"skipped {skipped['stage']}: {skipped['why']}" for skipped in results.get("skipped", [])]
    return "\n".join(lines)


def _tier_rows(name: str, tier: dict[str, Any], results: dict[str, Any]) -> list[str]:
    rows = []
    for count, batch in tier.get("sequences", {}).items():
        figures = results["derived"]["lamella"].get(name, {}).get(count)
        share = f"{figures['efficiency']:.1%}" if figures else "-"
        who = f"lamella {name}"
        rows.append(_row(who, count, (batch["s_per_sweep"], batch["tokens_per_s"]), share, batch["label"]))
        rows[-1] += _verdict(f"{who} N={count}", results)
    return rows + ([f"lamella {name}: {tier['error']}"] if "error" in tier else [])


def _peer_rows(name: str, count: str, run: dict[str, Any], results: dict[str, Any]) -> list[str]:
    rows = []
    for key in ("kept", "dropped"):
        if key in run:
            figures = (run[key]["s_per_token"], run[key]["tokens_per_s"])
            rows.append(_row(f"{name}, cache {key}", count, figures, "-", run[key]["label"]))
            rows[-1] += _verdict(f"{name} N={count}", results)
    return rows


def _row(who: str, count: str, figures: tuple[float, float], share: str, label: str) -> str:
    return f"{who:<34}{count:>4}{figures[0]:>10.4f}{figures[1]:>10.2f}{share:>10}  {label:<10}"


def _verdict(name: str, results: dict[str, Any]) -> str:
    tokens = results["derived"].get("tokens", {})
    if name == tokens.get("reference"):
        return "reference"
    outcome = tokens.get("compared", {}).get(name)
    if outcome is None:
        return "-"
    return "yes" if outcome["tokens_equal"] else f"no, from {outcome['first_difference']}"
