"""What ``POST /v1/embeddings`` takes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lamella.embedding import MAX_TEXTS, Pooling
from lamella.messages import MAX_PROMPT_CHARS
from lamella_gateway.request_base import RequestBase, UserName

EmbeddedText = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]


class EmbeddingRequest(RequestBase):
    """Texts whose vectors are wanted; the last two fields are Lamella's own."""

    WHY: ClassVar[dict[str, str]] = {
        "input": f"Give a text, or a list of up to {MAX_TEXTS}; token ids are not taken, send their text",
        "dimensions": "Vectors have the model's width; they are not shortened",
        "encoding_format": "The formats are float and base64",
    }

    model: Annotated[str, Field(min_length=1, max_length=200)]
    input: EmbeddedText | Annotated[tuple[EmbeddedText, ...], Field(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    user: UserName | None = None
    dimensions: None = None
    pooling: Pooling | None = None
    normalised: bool | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts, a single one too."""
        return (self.input,) if isinstance(self.input, str) else self.input
