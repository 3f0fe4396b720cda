"""The page of families is as new as the families: the same ones, on the same paths, refused for the same reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

from lamella_engine import architecture
from lamella_engine.errors import UnsupportedModel
from tests import tiny_models

PAGE = Path(__file__).resolve().parent.parent / "docs/families.md"


def rows() -> dict[str, list[str]]:
    """The cells of each family's line."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {line[0]: line[1:] for line in cells}


def test_the_page_has_every_family_and_was_written_with_this_version() -> None:
    assert set(rows()) == set(tiny_models.FAMILIES | tiny_models.REFUSED)
    assert f"transformers {transformers.__version__} " in PAGE.read_text()


def test_every_family_that_runs_is_exact() -> None:
    for family, (_, alone, batched, _, packed, *_) in rows().items():
        expected = ("exact",) * 3 if family in tiny_models.FAMILIES else ("",) * 3
        assert (alone, batched, packed) == expected, family


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "mixtral", "falcon", "mamba2", "qwen3_next"])
def test_paths_are_those_of_today(family: str) -> None:
    config = AutoConfig.for_model(family, **tiny_models.FAMILIES[family])

    built = architecture.build(config, torch.float32)

    path, _, _, _, _, prompts, _ = rows()[family]
    assert path == built.path
    assert prompts == ("in parts" if built.reads_in_parts else "at once")


def test_refusals_are_those_of_today() -> None:
    for family, shape in tiny_models.REFUSED.items():
        with pytest.raises(UnsupportedModel) as refusal:
            architecture.build(AutoConfig.for_model(family, **shape), torch.float32)

        assert rows()[family][0] == "refused"
        assert rows()[family][-1] == str(refusal.value).replace("|", "/")
