"""Writes docs/families.md: what the engine does with a tiny random model of every family that the tests know.

    python -m tools.support_table [PAGE]

Each family is built, sharded and run as the tests do it: three prompts of different lengths, alone and together in one
batch, their tokens held against transformers' full load; what fails is written as it failed. Nothing on the page is
written by hand; `tests/test_families_page.py` sees to it that the page is not older than the families.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.errors import EngineError, UnsupportedModel
from lamella_engine.experts import find_experts
from lamella_engine.inspection import inspect
from lamella_engine.model_traits import ROUTED_COUNTS, first_whole
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens, gather, generate, submit_ids
from tests.engine.expanded_models import expected_tokens

PAGE = Path(__file__).resolve().parent.parent / "docs/families.md"
PROMPTS = [list(range(5, 10)), list(range(10, 50)), [9, 8, 7]]
NEW_TOKENS = 10
QUANT = "nf4"
INTRODUCTION = """# Families

What becomes of each family of transformers {version} that the tests know. `make families` writes this page from running
a tiny random model of each: three prompts, alone and in one batch, against transformers' own full load in float32.

* *packed*: all sequences ride one row, attention is Lamella's own. *stepwise*: each sequence runs the model's own
  forward, side by side, layer by layer ([005](decisions/005-stepwise-families.md)).
* *experts*: *visited* means that with few tokens a sweep moves only those ([006](decisions/006-expert-streaming.md));
  *whole* that a layer which streams comes with all of them.
* *nf4*: packed in four bits, from disk, in one batch: *exact* if its tokens are those of the weights that it expands to
  ([007](decisions/007-packed-formats.md)).
* *prompts*: *in parts*: a long one rides along with others' tokens; *at once*: it is read in one step, and one that is
  longer than a sweep has a sweep to itself, if the memory set aside allows.

Families that existed as code only are on a [page of their own](importing.md). Any other family of transformers is
tried in the same way when its checkpoint is opened, and refused before a shard is written if it cannot run.

| family | path | alone | in a batch | experts | nf4 | prompts | notes |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One family's line."""

    family: str
    path: str
    alone: str = ""
    batched: str = ""
    experts: str = ""
    packed: str = ""
    prompts: str = ""
    notes: str = ""

    def __str__(self) -> str:
        cells = (self.family, self.path, self.alone, self.batched, self.experts, self.packed, self.prompts, self.notes)
        return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """Write the page; 1 if a family gave other tokens than its full load."""
    page = Path(arguments[0]) if arguments else PAGE
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # that they have no tokenizer
    rows = []
    for family in sorted(tiny_models.FAMILIES | tiny_models.REFUSED):
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="lamella-families-") as scratch:
            warnings.simplefilter("ignore")
            rows.append(measure(family, Path(scratch)))
        print(rows[-1], flush=True)
    page.write_text(INTRODUCTION.format(version=transformers.__version__) + "".join(f"{row}\n" for row in rows))
    return int(any("no" in (row.alone, row.batched, row.packed) for row in rows))


def measure(family: str, scratch: Path) -> Row:
    """Run one family, in the directory `scratch`."""
    source = tiny_models.save_family(family, scratch / "source")
    store = ShardStore(scratch / "store")
    try:
        sharded = store.ensure("tiny", source=source)
    except UnsupportedModel as error:
        return Row(family, "refused", notes=str(error).replace("|", "/"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [full_load_tokens(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    options = EngineOptions(store=store.root, device="cpu", sweep_tokens=64, ram=0)
    sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
    try:
        with Engine.open_sharded(sharded, torch.device("cpu"), options) as engine:
            alone = [generate(engine, prompt, sampling).token_ids for prompt in PROMPTS]
            together = _together(engine, sampling)
            path, reads_whole = str(engine.model.path), engine.model.reads_whole
        packed = store.ensure("tiny", form=StoredForm(quant=QUANT))
        with Engine.open_sharded(packed, torch.device("cpu"), options) as engine:
            from_packed = _together(engine, sampling)
    except EngineError as error:
        return Row(family, "failed", "no", "no", notes=f"{type(error).__name__}: {error}".replace("|", "/"))
    return Row(
        family,
        path,
        "exact" if alone == expected else "no",
        "exact" if together == expected else "no",
        _experts(sharded, store),
        "exact" if from_packed == expected_tokens(source, QUANT, PROMPTS, NEW_TOKENS) else "no",
        "at once" if reads_whole else "in parts",
    )


def _together(engine: Engine, sampling: Sampling) -> list[list[int]]:
    for name, prompt in enumerate(PROMPTS):
        submit_ids(engine, str(name), prompt, sampling)
    outcomes = gather(engine, {str(name) for name in range(len(PROMPTS))})
    return [outcomes[str(name)].token_ids for name in range(len(PROMPTS))]


def _experts(sharded: ShardedModel, store: ShardStore) -> str:
    facts = inspect("tiny", store)
    if facts.experts is None:
        return ""
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    routed = first_whole(built.config, ROUTED_COUNTS)
    pairs = zip(built.layers, sharded.layers, strict=True)
    return "visited" if any(find_experts(layer, shard.tensors, routed) for layer, shard in pairs) else "whole"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
