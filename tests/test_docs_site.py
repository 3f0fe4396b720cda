"""The site builds, its reference is what the code says, and every page can be found from its menu."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs_links import on_page_markdown
from tools.reference_pages import FOLDER, VARIABLES, pages

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("client", "engine", "worker")
# Of packages that Lamella uses, so that no line of ours reads them.
OF_OTHERS = {"FLOWER_BASIC_AUTH", "HF_TOKEN", "HF_HOME"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")
    target = tmp_path_factory.mktemp("site")
    outcome = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return target


def test_site_has_every_page_of_the_docs(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        path = name.with_name("index.html") if page.stem == "README" else name
        assert (site / path).is_file(), path


def test_menu_leads_to_every_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()

    for page in (ROOT / "docs").rglob("*.md"):
        assert f"- {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu, page.name


def test_diagrams_are_drawn(site: Path) -> None:
    assert 'class="mermaid"' in (site / "architecture.html").read_text()


def test_links_to_files_of_the_repository_become_their_paths(site: Path) -> None:
    text = (site / "architecture.html").read_text()

    assert "client/lamella/keys.py" in text
    assert 'href="../client' not in text


class _File:
    src_uri = "howto/page.md"


class _Page:
    file = _File()


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[the other](../other.md#part)", "[the other](../other.md#part)"),
        ("[values](../../configs/values.yaml)", "values (`configs/values.yaml`)"),
        ("[values.yaml](../../configs/values.yaml)", "values.yaml"),
        ("[out](https://example.org/x)", "[out](https://example.org/x)"),
        ("```bash\n[x](../../y)\n```", "```bash\n[x](../../y)\n```"),
    ],
)
def test_hook_rewrites_only_what_is_no_page(written: str, shown: str) -> None:
    assert on_page_markdown(written, page=_Page()) == shown


@pytest.mark.parametrize("name", pages())
def test_reference_is_what_the_code_says(name: str) -> None:
    assert (FOLDER / name).read_text() == pages()[name], "run `python -m tools.reference_pages`"


def test_reference_lists_the_variables_that_the_code_reads() -> None:
    source = "".join(path.read_text() for top in SOURCES for path in (ROOT / top).rglob("*.py"))

    read = set(re.findall(r'"(LAMELLA_[A-Z_]+)"', source))
    secrets = {"LAMELLA_REDIS_URL", "LAMELLA_REDIS_PASSWORD", "LAMELLA_PEER_TOKEN"}  # each may be in a file instead

    assert set(VARIABLES) - OF_OTHERS == read | {f"{name}_FILE" for name in secrets}
