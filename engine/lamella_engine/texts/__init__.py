"""The text that `lamella quality` measures with where none is given: where it lies, and what it must hash to.

`README.md` beside it says what it is and why everyone may use it. Read by `quality_text`.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT_TEXT = Path(__file__).parent / "persuasion.txt"
DEFAULT_TITLE = "Persuasion, volume one (Jane Austen)"
# SHA-256 of the file: figures that were measured with another text are not comparable.
DEFAULT_DIGEST = "7591086f6f7409cb479cb43dd502ed507e6bacf81466a5adea80f8ac0434fd15"
