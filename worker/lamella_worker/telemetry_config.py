"""The table ``[telemetry]`` of a worker's settings: what it tells to whom beside Redis and its log.

Owns the settings only; `config` reads them with the others, `telemetry` and `log_setup` act on them. All of it is off
unless asked for.
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator


class TelemetryTable(BaseModel):
    """Metrics, the form of the log, and traces."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of Prometheus metrics, or the first free one after it; 0 takes any, left out there are none",
    )
    metrics_host: str = Field(
        default="127.0.0.1", description="address that metrics are served on; nothing there asks for a password"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="text for people, json for one JSON object a line"
    )
    traces: str | None = Field(
        default=None, description="OTLP endpoint for traces, such as http://127.0.0.1:4318/v1/traces; left out, none"
    )

    @field_validator("metrics_host")
    @classmethod
    def _usable_host(cls, value: str) -> str:
        if not value or any(character.isspace() or character == "/" for character in value):
            raise ValueError("it is not a host name or address")
        return value

    @field_validator("traces")
    @classmethod
    def _usable_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError("it is not an http:// or https:// URL with a host")
        return value
