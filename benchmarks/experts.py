"""A mixture-of-experts model from disk, its layers whole and with only the experts that are visited.

    python -m benchmarks.experts --json FILE
    python -m benchmarks.experts --device cuda --layers 16 --hidden 2048 --inner 7168 --experts 8 --routed 2
    python -m benchmarks.experts --ram 1GiB --expert-cache 100% --sequences 1
    python -m benchmarks.experts --quant nf4 --sequences 1,2,4

Writes a random Mixtral and decodes with several numbers of sequences, each twice: with every layer brought whole, and
with experts fetched when the router has chosen. RAM budget 0 unless another is given: all that streams comes from the
disk, past the file cache where that can be. With a share for experts it decodes a third time, the experts visited most
kept in memory; with a packed format all of that once more, the layers packed. Says how many bytes a token moves beside
what it needs (dense parts and its routed experts), how much of the time reads were under way, and from how many
sequences on whole layers are faster: `expert_share.SPARSE_SHARE` is set by that.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.json_file import write_json
from benchmarks.lamella_run import Watch, follow
from benchmarks.machine import Bystanders, machine_facts
from lamella_engine import (
    Engine,
    EngineOptions,
    Sampling,
    SequenceRequest,
    ShardStore,
    architecture,
    expert_share,
    experts,
)
from lamella_engine.placement import Tier
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm

WARM_UP_SWEEPS = 4
DEADLINE_S = 300.0
MODES = {"whole": -1.0, "visited": 1.0}  # experts are fetched up to this share of them
KEPT = "kept"  # as visited, and those visited most are kept in the memory that layers had
PACKED = "packed "  # before a mode: the layers are stored in the format that was asked for


def main(argv: list[str] | None = None) -> int:
    """Run everything; 0 if all figures were had, 1 if tokens depend on the mode."""
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lamella-experts-") as scratch:
        root = arguments.work_dir or Path(scratch)
        forms = {"": _shards(arguments, root)}
        if arguments.quant:
            forms[PACKED] = _packed(arguments, root)
        bystanders = Bystanders()
        results: dict[str, Any] = {
            "command": f"python -m benchmarks.experts {shlex.join(argv or sys.argv[1:])}",
            "machine": machine_facts(root, arguments.device),
            "needed_bytes": {f"{form}model": _needed(sharded, arguments.routed) for form, sharded in forms.items()},
            "layer_bytes": {
                f"{form}model": sum(shard.nbytes for shard in sharded.layers) for form, sharded in forms.items()
            },
            "sequences": {},
        }
        for count in arguments.sequences:
            figures = results["sequences"][str(count)] = {}
            for form, sharded in forms.items():
                for mode, share in MODES.items():
                    figures[form + mode] = _measure(sharded, arguments, count, share, "auto")
                if arguments.expert_cache != "auto":
                    kept = _measure(sharded, arguments, count, MODES["visited"], arguments.expert_cache)
                    figures[form + KEPT] = kept
                _say(count, figures, form, results["needed_bytes"][f"{form}model"])
            results["others_busy_cores"] = bystanders.busy_cores()
            if arguments.json:  # as far as it has come: a run may be cut short
                write_json(arguments.json, results)
    is_equal = all(
        each["token_ids"] == run[f"{_form(mode)}whole"]["token_ids"]
        for run in results["sequences"].values()
        for mode, each in run.items()
    )
    print("tokens do not depend on the mode" if is_equal else "error: tokens depend on the mode")
    return 0 if is_equal else 1


def _shards(arguments: argparse.Namespace, root: Path) -> ShardedModel:
    """The random model's shards, built unless `root` has them."""
    store = ShardStore(root / "store")
    if store.has("experts"):
        return store.open("experts")
    config = MixtralConfig(
        vocab_size=8192, hidden_size=arguments.hidden, intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 256), num_local_experts=arguments.experts,
        num_experts_per_tok=arguments.routed, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(root / "checkpoint", max_shard_size="1GB")
    del model
    gc.collect()
    return store.ensure("experts", source=root / "checkpoint")


def _packed(arguments: argparse.Namespace, root: Path) -> ShardedModel:
    """The same model with its layers packed."""
    return ShardStore(root / "store").ensure("experts", form=StoredForm(quant=arguments.quant))


def _form(mode: str) -> str:
    return PACKED if mode.startswith(PACKED) else ""


def _needed(sharded: ShardedModel, routed: int) -> int:
    """Bytes of what one token has to be multiplied with in all layers."""
    built = architecture.build(architecture.load_config(sharded.directory), getattr(torch, sharded.dtype))
    total = 0
    for layer, shard in zip(built.layers, sharded.layers, strict=True):
        own = experts.find_experts(layer, shard.tensors, routed)
        assert own is not None, "a Mixtral has experts in every layer"
        total += shard.nbytes - own.nbytes + routed * own.expert_bytes
    return total


def _measure(
    sharded: ShardedModel, arguments: argparse.Namespace, count: int, share: float, expert_cache: str
) -> dict[str, Any]:
    expert_share.SPARSE_SHARE = share
    device = torch.device(arguments.device if arguments.device == "cpu" else "cuda:0")
    options = EngineOptions(
        store=sharded.directory, device=str(device), max_sequences=max(8, count), ram=arguments.ram,
        vram=arguments.vram, expert_cache=expert_cache,
    )  # fmt: skip
    sampling = Sampling(max_tokens=WARM_UP_SWEEPS + arguments.sweeps + 8, ignore_eos=True)
    with Engine.open_sharded(sharded, device, options) as engine:
        names = [str(index) for index in range(count)]
        for index, name in enumerate(names):
            prompt = tuple((index * 31 + place * 7) % 8000 + 3 for place in range(16))
            engine.submit(SequenceRequest(name, sampling, prompt_ids=prompt))
        watch = Watch()
        marks = []
        for sweeps in follow(engine, watch, names, time.monotonic() + DEADLINE_S):
            if sweeps in (WARM_UP_SWEEPS, WARM_UP_SWEEPS + arguments.sweeps):
                marks.append(engine.counters())
            if len(marks) == 2:
                break
        on_disk, room = engine.plan.layer_bytes(Tier.DISK), engine.plan.experts
    first, last = marks
    stamps = watch.stamps[WARM_UP_SWEEPS - 1 : WARM_UP_SWEEPS + arguments.sweeps]
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    return {
        "s_per_sweep": statistics.median(seconds),
        "tokens_per_s": count / statistics.median(seconds),
        "disk_bytes_per_sweep": (last.disk_bytes - first.disk_bytes) / arguments.sweeps,
        "ram_bytes_per_sweep": (last.ram_bytes - first.ram_bytes) / arguments.sweeps,
        "planned_disk_bytes": on_disk,
        "reading_share": (last.read_s - first.read_s) / max(1e-9, last.sweep_s - first.sweep_s),
        "cache_bytes": {"vram": room.vram_bytes, "ram": room.ram_bytes},
        "experts_visited": last.experts_visited - first.experts_visited,
        "experts_in_vram": last.experts_in_vram - first.experts_in_vram,
        "experts_in_ram": last.experts_in_ram - first.experts_in_ram,
        "seconds": [round(second, 4) for second in seconds],
        "token_ids": watch.token_ids[names[0]][: WARM_UP_SWEEPS + arguments.sweeps],
    }


def _say(count: int, figures: dict[str, dict[str, Any]], form: str, needed: int) -> None:
    whole, visited = figures[f"{form}whole"], figures[f"{form}visited"]
    print(
        f"{count:>3} sequences: {form}whole layers {whole['s_per_sweep']:.3f} s a sweep, visited experts "
        f"{visited['s_per_sweep']:.3f} s ({whole['s_per_sweep'] / visited['s_per_sweep']:.2f} times as fast); it "
        f"reads {visited['disk_bytes_per_sweep'] / 1e6:.0f} MB in {visited['reading_share']:.0%} of its time, a token "
        f"needs {needed / 1e6:.0f} MB",
        flush=True,
    )
    if (kept := figures.get(form + KEPT)) is not None:
        hits = (kept["experts_in_vram"] + kept["experts_in_ram"]) / max(1, kept["experts_visited"])
        print(
            f"    experts kept: {kept['s_per_sweep']:.3f} s, {hits:.0%} of the visited ones were there; a sweep reads "
            f"{kept['disk_bytes_per_sweep'] / 1e6:.0f} MB",
            flush=True,
        )


def _counts(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights (%(default)s)")
    add("--layers", type=int, default=8, help="(%(default)s)")
    add("--hidden", type=int, default=1024, help="a multiple of 256 (%(default)s)")
    add("--inner", type=int, default=3584, help="width inside an expert (%(default)s)")
    add("--experts", type=int, default=8, help="(%(default)s)")
    add("--routed", type=int, default=2, help="(%(default)s)")
    add("--sequences", type=_counts, default="1,2,3,4,8", help="(%(default)s)")
    add("--sweeps", type=int, default=10, help="timed sweeps a figure (%(default)s)")
    add("--quant", help="a packed format to measure as well, such as nf4; lossless needs --dtype bfloat16")
    add("--ram", default="0", help="the engine's RAM budget (%(default)s)")
    add("--expert-cache", default="auto", help="measure a share for experts as well, such as 100%% (%(default)s: no)")
    add("--vram", default="auto", help="the engine's VRAM budget on a GPU (%(default)s)")
    add("--work-dir", type=Path, help="keeps checkpoint and shards")
    add("--json", type=Path, help="results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
