"""AirLLM, accelerate's offload and plain transformers, each measured in its own process on the same prompt.

Owns how each peer is loaded and nothing of when: `token_clock` stamps tokens, `stage` runs the process, `sweep`
decides the order. All of them read the same checkpoint directory and decode greedily, ignoring end tokens.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from benchmarks.checkpoint import tensor_bytes, weight_files
from benchmarks.machine import peak_rss_bytes
from benchmarks.stage import say
from benchmarks.token_clock import TokenClock

# Share of the cap that accelerate may plan weights into; the second is taken where the first leaves too little room
# for what it moves through. accelerate itself sets the largest layer aside within it.
ACCELERATE_SHARES = (0.85, 0.6)
CPU_RESIDENT_SHARE = 1 / 3  # of the weights that accelerate keeps in memory on a machine without a GPU


@dataclass(frozen=True)
class PeerSpec:
    """What one peer's process is told."""

    checkpoint: str
    device: str
    cap_bytes: int | None
    sequences: list[int]
    prompts: list[list[int]]  # as many as the most sequences
    warm_tokens: int
    cold_tokens: int
    deadline_s: float
    work_dir: str


class _Loaded(NamedTuple):
    """A peer ready to generate; `streamed_bytes` is what a token reads from `files` if nothing is cached."""

    model: Any
    generate: Callable[..., Any]
    streamed_bytes: int
    files: list[Path]
    facts: dict[str, Any]


def measure_peer(kind: str, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Load the peer `kind`, generate with every number of sequences, report seconds a token and the tokens.

    Raises:
        ValueError: there is no such peer.
    """
    peer = PeerSpec(**spec)
    device = torch.device(peer.device)
    deadline = time.monotonic() + peer.deadline_s
    if peer.cap_bytes is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(peer.cap_bytes / total, device)
    report: dict[str, Any] = {"peer": kind, "versions": _versions(), "cap_bytes": peer.cap_bytes}
    began = time.perf_counter()
    if kind.startswith("accelerate-"):
        yield from _measure_accelerate(kind, peer, report, deadline)
        return
    loaded = _load(kind, peer, device)
    report |= loaded.facts | {"load_s": round(time.perf_counter() - began, 2)}
    say(f"loaded in {report['load_s']} s")
    yield report
    yield from _generate_all(loaded, peer, report, deadline)


def _load(kind: str, peer: PeerSpec, device: torch.device) -> _Loaded:
    if kind == "transformers":
        return _load_transformers(peer, device)
    if kind.startswith("airllm"):
        return _load_airllm(peer, without_cleanup=kind.endswith("-no-cleanup"), packed_4bit="-4bit" in kind)
    raise ValueError(f"there is no peer {kind!r}")


def _load_airllm(peer: PeerSpec, *, without_cleanup: bool, packed_4bit: bool) -> _Loaded:
    import airllm
    from airllm import airllm_base

    if without_cleanup:
        airllm_base.clean_memory = lambda: None  # gc.collect, malloc_trim and empty_cache after every module
    model = airllm.AutoModel.from_pretrained(
        peer.checkpoint,
        device=peer.device,
        layer_shards_saving_path=str(Path(peer.work_dir) / "airllm"),
        compression="4bit" if packed_4bit else None,
    )
    is_tied = bool(model.tie_word_embeddings)
    own_files = sorted(Path(model.checkpoint_path).glob("*.safetensors"))
    sizes = tensor_bytes(Path(peer.checkpoint))
    streamed = sum(nbytes for name, nbytes in sizes.items() if not (is_tied and "embed_tokens" in name))
    facts: dict[str, Any] = {"airllm": importlib.metadata.version("airllm"), "cleanup": not without_cleanup}
    if packed_4bit:
        streamed = sum(file.stat().st_size for file in own_files)
        facts["compression"] = "4bit"
    return _Loaded(model.model, model.generate, streamed, own_files, facts)


def _load_transformers(peer: PeerSpec, device: torch.device) -> _Loaded:
    model = transformers.AutoModelForCausalLM.from_pretrained(peer.checkpoint, dtype="auto").to(device).eval()
    return _Loaded(model, model.generate, 0, weight_files(Path(peer.checkpoint)), {"resident": True})


def _measure_accelerate(kind: str, peer: PeerSpec, report: dict[str, Any], deadline: float) -> Iterator[dict[str, Any]]:
    """Try the largest share of the cap first, the next where the card runs out of memory."""
    refused: list[str] = []
    for share in ACCELERATE_SHARES if peer.device != "cpu" else (CPU_RESIDENT_SHARE,):
        began = time.perf_counter()
        try:
            loaded = _load_accelerate(kind, peer, share)
            report |= loaded.facts | {"load_s": round(time.perf_counter() - began, 2), "refused": refused}
            say(f"loaded in {report['load_s']} s, weights planned into {share:.0%} of the cap")
            yield report
            yield from _generate_all(loaded, peer, report, deadline)
            return
        except torch.cuda.OutOfMemoryError as error:
            refused.append(f"{share:.0%} of the cap: {str(error).splitlines()[0]}")
            say(f"out of memory with {share:.0%} of the cap")
        loaded = None  # type: ignore[assignment] # so that the model goes before the next try
        torch.cuda.empty_cache()
    raise RuntimeError("accelerate does not fit under the cap: " + "; ".join(refused))


def _load_accelerate(kind: str, peer: PeerSpec, share: float) -> _Loaded:
    sizes = tensor_bytes(Path(peer.checkpoint))
    if peer.device == "cpu":
        if kind == "accelerate-ram":
            raise ValueError("RAM offload is a way to spare a GPU's memory; on a CPU there is nothing to offload from")
        memory: dict[int | str, int] = {"cpu": int(share * sum(sizes.values()))}
    else:
        index = torch.device(peer.device).index or 0
        cap = peer.cap_bytes or torch.cuda.get_device_properties(index).total_memory
        memory = {index: int(share * cap), "cpu": 0 if kind == "accelerate-disk" else 1 << 50}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        peer.checkpoint,
        dtype="auto",
        device_map="auto",
        max_memory=memory,
        offload_folder=str(Path(peer.work_dir) / "accelerate"),
    ).eval()
    places = {name: str(place) for name, place in getattr(model, "hf_device_map", {}).items()}
    streamed = sum(nbytes for name, nbytes in sizes.items() if _place_of(name, places) == "disk")
    off = sum(nbytes for name, nbytes in sizes.items() if _place_of(name, places) in ("disk", "cpu"))
    facts = {
        "accelerate": importlib.metadata.version("accelerate"),
        "max_memory": {str(key): value for key, value in memory.items()},
        "disk_bytes_placed": streamed,
        "offloaded_bytes": off if peer.device != "cpu" else streamed,
    }
    return _Loaded(model, model.generate, streamed, weight_files(Path(peer.checkpoint)), facts)


def _place_of(tensor: str, places: dict[str, str]) -> str:
    """Where the longest module name that begins the tensor's name is placed."""
    names = [name for name in places if name == "" or tensor == name or tensor.startswith(name + ".")]
    return places[max(names, key=len)] if names else ""


def _generate_all(loaded: _Loaded, peer: PeerSpec, report: dict[str, Any], deadline: float) -> Iterator[dict[str, Any]]:
    """Generate with every number of sequences, fewest first; yields after each."""
    device = torch.device(peer.device)
    report["sequences"] = {}
    for count in peer.sequences:
        if time.monotonic() > deadline:
            report["skipped"] = f"{count} sequences and more: the stage's time was up"
            break
        say(f"{count} sequences")
        report["sequences"][str(count)] = _generate(loaded, peer, count, deadline)
        report["peak_rss_bytes"] = peak_rss_bytes()
        if device.type == "cuda":
            report["vram_peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
            report["vram_peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        yield report
    yield report


def _generate(loaded: _Loaded, peer: PeerSpec, count: int, deadline: float) -> dict[str, Any]:
    device = torch.device(peer.device)
    config = loaded.model.generation_config
    config.eos_token_id = None  # an end token ends nothing here, for nobody
    config.do_sample = False
    config.temperature = config.top_p = config.top_k = None
    clock = TokenClock(device, loaded.files, peer.warm_tokens, deadline)
    prompts = torch.tensor(peer.prompts[:count], device=device)
    with torch.inference_mode():
        output = loaded.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=1 + peer.warm_tokens + peer.cold_tokens,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
            use_cache=True,
            pad_token_id=0,
        )
    return {"token_ids": output[:, prompts.shape[1] :].tolist()} | clock.report(count, loaded.streamed_bytes)


def measure_margins(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The two largest logits after each of `spec["prefixes"]`, from the whole model in one forward pass.

    `spec`: checkpoint, device, prefixes (lists of token ids).
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["checkpoint"], dtype="auto")
    model = model.to(spec["device"]).eval()
    margins = []
    for prefix in spec["prefixes"]:
        with torch.inference_mode():
            logits = model(torch.tensor([prefix], device=spec["device"])).logits[0, -1].float()
        top = torch.topk(logits, 2)
        values = top.values.tolist()
        margins.append({"top": top.indices.tolist(), "logits": values, "margin": values[0] - values[1]})
        yield {"margins": margins}


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}
