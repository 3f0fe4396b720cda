"""A hook of mkdocs: links of a page to files of the repository that are no pages become their text and path.

Pages are read in the repository as well, where such links lead somewhere. Owns nothing but this rewriting; that the
links resolve in the repository is held by tests/test_readme.py.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page's text with such links rewritten; code stays as it is."""
    folder = posixpath.dirname(page.file.src_uri)
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _rewritten(part, folder) for part in parts)


def _rewritten(text: str, folder: str) -> str:
    def replace(match: re.Match[str]) -> str:
        shown, target, _ = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match.group()
        return shown if shown.strip("`") in (path, posixpath.basename(path)) else f"{shown} (`{path}`)"

    return _LINK.sub(replace, text)
