"""The fenced blocks of README and docs, each with its page, language, text and number on the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; `number` counts the blocks of its language on its page from 1."""

    page: str
    language: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.language}{self.number}"


def blocks(language: str) -> list[Block]:
    """Every block of a language, in the order of pages."""
    return [block for page in PAGES for block in _of(page, language)]


def lines(block: Block) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and blank lines left out."""
    joined = re.sub(r"\\\n\s*", "", block.text).splitlines()
    return [line.strip() for line in joined if line.strip() and not line.strip().startswith("#")]


def _of(page: Path, language: str) -> Iterator[Block]:
    name = page.relative_to(ROOT).as_posix().removeprefix("docs/")
    found = (body for kind, body in _FENCE.findall(page.read_text()) if kind == language)
    for number, body in enumerate(found, 1):
        yield Block(name, language, number, body)
