"""What a worker serves, reduced to one engine under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lamella_worker.engine_port import LocalEngine


@dataclass
class OneModel:
    """An engine that is found under its model's name alone, and always ready."""

    engine: LocalEngine
    model: str = "tiny"

    @property
    def engines(self) -> Mapping[str, LocalEngine]:
        return {self.model: self.engine}

    def find(self, model: str) -> LocalEngine | None:
        return self.engine if model == self.model else None

    def wait_ready(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.engine.close()
