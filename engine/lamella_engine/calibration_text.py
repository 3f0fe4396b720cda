"""The text that a packed model's codes are chosen for, and its windows.

Owns where the text comes from, how much of it is used, and that equal texts are told from others. Neighbours:
`quant_spec` reads which one is meant, `layer_inputs` has its windows pass the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamella_engine.errors import CheckpointError, OptionError
from lamella_engine.quality_text import begins_with, check_known, first_ids, read_text
from lamella_engine.texts import CALIBRATION_DIGEST, CALIBRATION_TEXT

WINDOW_TOKENS = 512
MAX_TOKENS = 65_536  # of the text that ships, all of them
MIN_TOKENS = 4096  # fewer say too little of the inputs of a layer
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class CalibrationText:
    """A text in a file.

    Attributes:
        path: the file; None means the one that ships.
        digest: SHA-256 of the text, in hex.
    """

    path: Path | None
    digest: str

    def __str__(self) -> str:
        """The text as a specification names it: the same for the same text, wherever it lies."""
        return "calibrated" if self.path is None else f"calibrated={self.digest[:_SHOWN_DIGITS]}"

    @classmethod
    def read(cls, path: str | None) -> CalibrationText:
        """The text in the file at `path`, or the one that ships.

        Raises:
            OptionError: it cannot be read, or is no text in UTF-8.
        """
        if path is None:
            return cls(None, CALIBRATION_DIGEST)
        found = Path(path).expanduser()
        try:
            return cls(found, read_text(found).digest)
        except OSError as error:
            raise OptionError(
                f"quant: calibrated={path}: the text cannot be read ({error.strerror or error}); name a file of plain "
                "text, or leave '=FILE' out for the text that ships"
            ) from error

    def windows(self, tokenizer: Any, vocabulary: int, context_tokens: int) -> torch.Tensor:
        """The text in windows of equal length, each from its beginning, as the tokenizer begins a text.

        Args:
            tokenizer: the model's.
            vocabulary: tokens that the model knows.
            context_tokens: that it takes at once.

        Returns:
            int64 [windows, at most 512].

        Raises:
            OptionError: the text is too short, or not what it was when it was named.
            CheckpointError: the tokenizer gives tokens that the model does not know.
        """
        text = read_text(self.path or CALIBRATION_TEXT)
        if text.digest != self.digest:
            raise OptionError(f"quant: the text {text.title} has changed meanwhile; start again")
        prefix = begins_with(tokenizer)
        room = min(WINDOW_TOKENS, context_tokens) - len(prefix)
        if room < 1:
            raise CheckpointError(f"the model's context of {context_tokens} tokens has no room for a text")
        ids = first_ids(tokenizer, text.content, MAX_TOKENS)
        if len(ids) < max(room, MIN_TOKENS):
            raise OptionError(
                f"quant: {text.title} has {len(ids)} tokens, and calibrating needs {max(room, MIN_TOKENS)}; give a "
                "longer text, or leave '=FILE' out for the text that ships"
            )
        check_known((*prefix, *ids), vocabulary)
        starts = range(0, len(ids) - room + 1, room)
        return torch.tensor([[*prefix, *ids[start : start + room]] for start in starts], dtype=torch.int64)
