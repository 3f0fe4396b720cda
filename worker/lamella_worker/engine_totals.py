"""Totals of engines that came one after the other, or run side by side, as those of one.

Owns which figures add up. `child_engine` adds up the processes of an engine, `serving` the models of a worker.
"""

from __future__ import annotations

from dataclasses import fields, replace

from lamella_engine.sequence_types import EngineCounters

NO_COUNTERS = EngineCounters(
    running=0, waiting=0, sweeps=0, tokens=0, streamed_bytes=0, peak_rss_bytes=0, last_sweep_at=None
)
_OF_NOW = ("running", "waiting", "batch_limit", "kv_blocks", "kv_blocks_used")  # the other figures are totals
_OWN_RULE = ("peak_rss_bytes", "last_sweep_at")


def summed(past: EngineCounters, now: EngineCounters) -> EngineCounters:
    """An engine's totals with those of the ones before it: figures that count are added, of memory the peak counts."""
    total = {
        field.name: getattr(past, field.name) + getattr(now, field.name)
        for field in fields(EngineCounters)
        if field.name not in (*_OF_NOW, *_OWN_RULE)
    }
    return replace(
        now,
        peak_rss_bytes=max(past.peak_rss_bytes, now.peak_rss_bytes),
        last_sweep_at=now.last_sweep_at or past.last_sweep_at,
        **total,
    )


def ended(counters: EngineCounters) -> EngineCounters:
    """What stays of an engine that is no more: its totals."""
    return replace(counters, **dict.fromkeys(_OF_NOW, 0))


def together(counters: list[EngineCounters]) -> EngineCounters:
    """The figures of engines side by side: all are added; of memory and time, which they share, the largest counts."""
    sweeps = [each.last_sweep_at for each in counters if each.last_sweep_at is not None]
    total = {
        field.name: sum(getattr(each, field.name) for each in counters)
        for field in fields(EngineCounters)
        if field.name not in _OWN_RULE
    }
    return replace(
        NO_COUNTERS,
        peak_rss_bytes=max((each.peak_rss_bytes for each in counters), default=0),
        last_sweep_at=max(sweeps, default=None),
        **total,
    )
