"""Model names: the rule, and that no name reaches outside the store."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lamella.messages import check_model_name as wire_check
from lamella_engine import names
from lamella_engine.errors import ModelNameError

GOOD = ["a", "SmolLM2-135M-Instruct", "owner/name", "o.w_n-er/n.a_m-e", "owner/name@0123abc", "plain@" + "f" * 64]
BAD = [
    "", ".", "..", "a/..", "../a", "a/../b", "/etc/passwd", "a/b/c", "a//b", ".hidden", "a/.hidden", "-a", "a b",
    "a\x00", "a\\b", "a@main", "a@123456", "a@" + "f" * 65, "a@0123ABC", "é", "a+b", "x" * 201, "~", "C:", "a/", "a..b",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_one_directory_of_the_store(name: str) -> None:
    assert names.check_model_name(name) == name
    assert len(Path(names.directory_name(name)).parts) == 1
    assert names.model_name(Path("store") / names.directory_name(name)) == name


@pytest.mark.parametrize("name", [*BAD, "a\n", "owner/name\n"])
def test_a_bad_name_is_refused_and_told_the_rule(name: str) -> None:
    with pytest.raises(ModelNameError, match="owner/name@revision"):
        names.check_model_name(name)


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_the_wire_and_the_store_have_the_same_rule(name: str) -> None:
    try:
        on_the_wire = wire_check(name) == name
    except ValueError:
        on_the_wire = False

    assert names.is_model_name(name) == on_the_wire


def test_different_names_have_different_directories() -> None:
    candidates = [*GOOD, "a/b", "a-b", "a.b", "a_b", "a--b", "owner--name", "owner-name", "owner/name@0123abd"]

    directories = {names.directory_name(name) for name in candidates}

    assert len(directories) == len(set(candidates))


@pytest.mark.parametrize("base", ["my model (v2)", "...hidden", "-", "ünïcode", "x" * 255, "weights.GGUF", "a..b"])
def test_any_path_has_a_name_of_its_own(base: str, tmp_path: Path) -> None:
    path, other = tmp_path / "here" / base, tmp_path / "there" / base

    name = names.name_from_path(path)

    assert names.is_model_name(name)
    assert name == names.name_from_path(path)
    assert name != names.name_from_path(other)


def test_a_name_from_a_path_is_readable() -> None:
    name = names.name_from_path(Path("/models/SmolLM2-135M.Q4_1.gguf"))

    assert re.fullmatch(r"SmolLM2-135M\.Q4_1-[0-9a-f]{8}", name)


def test_a_revision_is_split_off() -> None:
    assert names.split_revision("owner/name@0123abc") == ("owner/name", "0123abc")
    assert names.split_revision("owner/name") == ("owner/name", None)
