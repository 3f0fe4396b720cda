"""Keeps the code in bounds that no linter checks: lengths, waits without a deadline, silences, leftovers.

Owns the rules below and nothing else; complexity, argument counts and broad excepts are ruff's, import directions are
import-linter's. Looks at the syntax tree and at comments, so words in texts do not trip it.

    python -m tools.ceilings [FILE_OR_DIRECTORY ...]      prints file:line: rule; 1 if anything is found
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("client", "engine", "worker")
SUPPORT = ("tests", "tools", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
WAITS = frozenset({"get", "join", "wait", "acquire", "recv", "result"})
SWEEP_FILE = "sweep.py"
SYNCS = frozenset({"item", "cpu", "tolist", "numpy", "synchronize"})

_BARE_IGNORE = re.compile(r"#\s*(type:\s*ignore(?!\[)|noqa(?!:))")
_LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


class Finding(NamedTuple):
    """One breach: where, and of which rule."""

    path: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


def check_file(path: Path, *, is_product: bool, is_test: bool = False) -> list[Finding]:
    """Return the breaches in one Python file; product code has more rules than tests and tools."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    findings = [*_length(path, text), *_comments(path, text)]
    for node in ast.walk(tree):
        if is_product:
            findings += _product_rules(path, node)
            if path.name == SWEEP_FILE:
                findings += _sweep_rules(path, node)
        if is_test:
            findings += _test_rules(path, node)
    return sorted(findings)


def _length(path: Path, text: str) -> Iterator[Finding]:
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield Finding(path, MAX_FILE_LINES + 1, f"the file has {lines} lines, {MAX_FILE_LINES} are allowed")


def _comments(path: Path, text: str) -> Iterator[Finding]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        if _BARE_IGNORE.search(token.string):
            yield Finding(path, token.start[0], "an ignore names its code: type: ignore[code], noqa: CODE")
        if found := _LEFTOVER.search(token.string):
            yield Finding(path, token.start[0], f"{found[0]} left in the code")


def _product_rules(path: Path, node: ast.AST) -> Iterator[Finding]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield Finding(path, node.lineno, f"{node.name} has {lines} lines, {MAX_FUNCTION_LINES} are allowed")
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in WAITS and not node.args and not node.keywords:
            yield Finding(path, node.lineno, f".{node.func.attr}() waits without a deadline")
    elif isinstance(node, ast.Subscript) and ast.unparse(node) in ("dict[str, Any]", "Dict[str, Any]"):
        yield Finding(path, node.lineno, "dict[str, Any] where a type of one's own belongs")
    elif isinstance(node, ast.Raise) and node.exc is not None and _last_name(node.exc) == "NotImplementedError":
        yield Finding(path, node.lineno, "NotImplementedError: no stubs")


def _sweep_rules(path: Path, node: ast.AST) -> Iterator[Finding]:
    if isinstance(node, ast.Import | ast.ImportFrom) and "logging" in {alias.name for alias in node.names}:
        yield Finding(path, node.lineno, "the sweep does not log")
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SYNCS:
        yield Finding(path, node.lineno, f".{node.func.attr}() in the sweep waits for the device")


def _test_rules(path: Path, node: ast.AST) -> Iterator[Finding]:
    if isinstance(node, ast.Call) and _last_name(node.func) == "sleep":
        yield Finding(path, node.lineno, "sleep in a test; use wait_until(condition, deadline_s)")
    elif isinstance(node, ast.ImportFrom | ast.Import):
        modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
        if modules & {"unittest.mock", "mock"}:
            yield Finding(path, node.lineno, "mocks in a test; use the real thing or a second implementation")
    elif isinstance(node, ast.Attribute) and ast.unparse(node).endswith("mock.patch"):
        yield Finding(path, node.lineno, "mock.patch in a test")


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def check(paths: Iterable[Path], root: Path = ROOT) -> list[Finding]:
    """Return the breaches in all Python files at or under `paths`; what a file is follows from its place in `root`."""
    findings: list[Finding] = []
    for path in sorted({file for given in paths for file in _python_files(given)}):
        inside = path.resolve().is_relative_to(root.resolve())
        top = path.resolve().relative_to(root.resolve()).parts[0] if inside else ""
        findings += check_file(path, is_product=top in PRODUCT, is_test=top == "tests")
    return findings


def _python_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    else:
        yield from (file for file in path.rglob("*.py") if "__pycache__" not in file.parts)


def main(arguments: list[str]) -> int:
    """Check what is named, or everything; 1 if there are findings."""
    paths = [Path(argument) for argument in arguments]
    paths = paths or [ROOT / top for top in (*PRODUCT, *SUPPORT) if (ROOT / top).is_dir()]
    if missing := [str(path) for path in paths if not path.exists()]:
        print(f"error: there is no {', '.join(missing)}", file=sys.stderr)
        return 2
    findings = check(paths)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
