"""The texts that ship, one to measure with and another to calibrate with: where they lie, and what they must hash to.

`README.md` beside them says what they are and why everyone may use them. Read by `quality_text` and `calibration_text`.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT_TEXT = Path(__file__).parent / "persuasion.txt"
DEFAULT_TITLE = "Persuasion, volume one (Jane Austen)"
# SHA-256 of the file: figures that were measured with another text are not comparable.
DEFAULT_DIGEST = "7591086f6f7409cb479cb43dd502ed507e6bacf81466a5adea80f8ac0434fd15"
CALIBRATION_TEXT = Path(__file__).parent / "emma.txt"
CALIBRATION_DIGEST = "ac768a817c36037fb61005f04717ca091099675d3019baa405bb4a4affdcb3ae"
