"""A model as a store is asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamella_engine.quant_mix import SizeTarget
from lamella_engine.quant_spec import QuantSpec
from lamella_engine.stored_form import StoredForm

PLAIN = StoredForm()


@dataclass(frozen=True)
class WantedModel:
    """Its name, the local source if one was given, and how it is to be stored."""

    name: str
    origin: Path | None
    dtype: str | None
    form: StoredForm = PLAIN
    quant: QuantSpec | SizeTarget | None = None
