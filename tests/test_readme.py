"""What README, docs and CONTRIBUTING show is there: commands, options, snippets, paths, links, tables."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from lamella.cli.app import app as lamella_app
from lamella.messages import SamplingParams
from tests.shown_commands import complaint_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = ("client", "engine", "worker")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}(?! *[-*]).*\n)+", re.MULTILINE)
# Lines of Flower's page, and what keys are derived for.
NO_COMMANDS = {"lamella device", "lamella model", "lamella plan", "lamella engine", "lamella job 1 <origin>"}
PROJECT_PATH = re.compile(r"(?<![\w/-])(?:client|configs|docs|engine|tests|tools|worker)/[\w./@-]*\w")


class Shown(NamedTuple):
    """Something a page shows; what is only mentioned in a sentence need not be whole."""

    page: Path
    text: str
    is_whole: bool = True

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text}"


def _fenced(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def _shell_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks, fenced as bash or indented, with continued lines joined."""
    prose = FENCE.sub("", page.read_text())
    blocks = [*_fenced(page, "bash"), *(re.sub(r"^ {4}", "", block, flags=re.M) for block in INDENTED.findall(prose))]
    for block in blocks:
        yield from re.sub(r"\\\n\s*", "", block).splitlines()


def _commands() -> list[Shown]:
    """Every `lamella` command in a code block, or in the text between backticks."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`(lamella [^`]+)`", FENCE.sub("", page.read_text()))
        found += [Shown(page, line.strip()) for line in _shell_lines(page) if line.strip().startswith("lamella ")]
        found += [Shown(page, line, is_whole=False) for line in inline if line not in NO_COMMANDS]
    return found


def _make_targets() -> list[Shown]:
    return [Shown(page, target) for page in PAGES for target in re.findall(r"\bmake ([a-z]+)\b", _code(page))]


def _code(page: Path) -> str:
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    return "\n".join([*_shell_lines(page), *inline])


@pytest.mark.parametrize("shown", _commands(), ids=str)
def test_shown_command_is_understood(shown: Shown) -> None:
    text = shown.text if shown.is_whole else re.sub(r"[][]", "", shown.text)  # what may be left out stands in brackets

    complaint = complaint_of(text)

    is_unknown = complaint is not None and re.search("No such (command|option)", complaint) is not None
    assert complaint is None or (not shown.is_whole and not is_unknown), complaint


def test_readme_shows_every_command() -> None:
    words = {shlex.split(shown.text, comments=True)[1] for shown in _commands() if shown.page.name == "README.md"}
    known = set(typer.main.get_command(lamella_app).commands)  # type: ignore[attr-defined]  # a group has commands

    assert words == known


@pytest.mark.parametrize("shown", _make_targets(), ids=str)
def test_shown_make_target_exists(shown: Shown) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert shown.text in targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_compile_and_import_what_exists(page: Path) -> None:
    for snippet in _fenced(page, "python"):
        for node in ast.walk(ast.parse(snippet, filename=str(page))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_client_snippets_have_the_right_types(tmp_path: Path) -> None:
    snippets = [text for text in _fenced(ROOT / "README.md", "python") if "from lamella import" in text]
    for number, snippet in enumerate(snippets):
        (tmp_path / f"snippet{number}.py").write_text(snippet)

    outcome = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")),
            *map(str, tmp_path.glob("*.py")),
        ],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": "client"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert len(snippets) >= 2
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_resolve(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(path), f"{page.name} links to {target}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    for path in PROJECT_PATH.findall(_code(page)):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_files_named_in_the_contributors_guide_exist() -> None:
    names = re.findall(r"`(\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())

    for name in names:
        assert [path for top in SOURCES for path in (ROOT / top).rglob(name)], name


def test_tree_in_the_readme_is_the_tree() -> None:
    (tree,) = (body for body in _fenced(ROOT / "README.md", "") if "client/lamella/" in body)
    parent = ROOT

    for line in tree.splitlines():
        if line.startswith(" "):
            assert (parent / line.split()[0]).exists(), line
            continue
        names = line[: line.index("   ")].split()
        assert all((ROOT / name).exists() for name in names), line
        parent = ROOT / names[0]


def test_flower_command_names_a_module_that_exists() -> None:
    modules = {name for page in PAGES for name in re.findall(r"celery -A (\S+)", _code(page))}

    assert modules == {"lamella_worker.monitor"}
    assert importlib.import_module("lamella_worker.monitor").app.conf.broker_transport_options["global_keyprefix"]


def test_wire_page_lists_every_sampling_key_with_its_default() -> None:
    text = (ROOT / "docs" / "wire.md").read_text()
    table = text[text.index("| key | default") : text.index("**Events**")]
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", table, re.MULTILINE)
    shown = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}

    in_words = {"off": (None, 1.0, 0.0), "none": ((),), "drawn by the client": (None,)}

    assert set(shown) == set(SamplingParams.model_fields)
    for name, default in shown.items():
        actual: Any = SamplingParams.model_fields[name].default
        assert actual in in_words[default] if default in in_words else json.loads(default) == actual, name


def test_wire_page_names_codes_and_scripts_that_exist() -> None:
    text = (ROOT / "docs" / "wire.md").read_text()
    source = "".join(path.read_text() for top in SOURCES for path in (ROOT / top).rglob("*.py"))
    codes = re.findall(r"`(\w+)`", text[text.index("Codes of `failed`") : text.index("## Scripts")])
    scripts = re.findall(r"^\| `(\w+)` \|", text[text.index("## Scripts") :], re.MULTILINE)

    assert len(codes) > 5
    assert all(f'"{code}"' in source for code in codes if code != "failed")
    files = {path.stem for path in (ROOT / "client" / "lamella" / "lua").glob("*.lua")}
    assert set(scripts) == {stem for stem in files if not stem.startswith("_")}, "those with _ are parts of scripts"
