"""What ``POST /v1/batches`` takes."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from lamella_gateway.files import LONGEST_KEEP_S, SHORTEST_KEEP_S
from lamella_gateway.request_base import Metadata, RequestBase, Text

WINDOW = r"^[1-9][0-9]{0,7}[smhd]$"
LONGEST_WINDOW_S = 30 * 86400
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class ExpiresAfter(RequestBase):
    """How long the outputs are kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_KEEP_S, le=LONGEST_KEEP_S)


class BatchRequest(RequestBase):
    """A file of requests to be answered."""

    WHY: ClassVar[dict[str, str]] = {
        "endpoint": "All lines ask the one endpoint that is named here",
        "completion_window": "Give a whole number and s, m, h or d, such as 24h; at most 30d",
        "output_expires_after": "The anchor is created_at, the seconds are from an hour to 30 days",
    }

    input_file_id: Text
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Annotated[str, Field(pattern=WINDOW)]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _is_bounded(cls, value: str) -> str:
        if re.fullmatch(WINDOW, value) and int(value[:-1]) * _SECONDS[value[-1]] > LONGEST_WINDOW_S:
            raise ValueError("the window is longer than 30 days")
        return value

    @property
    def window_s(self) -> int:
        """The completion window in seconds."""
        return int(self.completion_window[:-1]) * _SECONDS[self.completion_window[-1]]

    @property
    def keep_s(self) -> int:
        """How long outputs are kept, in seconds."""
        return LONGEST_KEEP_S if self.output_expires_after is None else self.output_expires_after.seconds
