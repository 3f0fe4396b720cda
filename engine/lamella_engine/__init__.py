"""The layer-streaming engine: runs language models whose weights do not fit the device, several sequences a sweep.

In the order data flows through them:

- `names`, `hub`, `hub_headers`, `hub_errors`, `weight_source`, `safetensors_header`, `weight_choice`, `weight_files`,
  `json_file`, `dequantise`, `checkpoint`, `gguf_header`, `gguf_checkpoint`: where a model comes from, and what it
  expands to.
- `unpickle`, `pickled_checkpoint`: pickled weights, on demand, made into such a checkpoint.
- `peer_address`, `peer_server`, `peer_client`, `peer_fetch`: shards from another host's store, and for it.
- `architecture`, `family_path`, `rehearsal`, `state_size`: the module tree without weights, whether and how it can run
  here, and what its sequences keep; `narrow_copy`, `parts_probe`: whether its prompts may be read in parts.
- `importers`: families that exist as code of their own only, brought onto transformers' classes; `alibi`: linear
  position biases for those that need them.
- `quant_spec`, `formats`, `strips`, `packed_shard`, `quant_mix`, `stored_form`: which weights are stored in fewer
  bytes, and how;
  `calibration_text`, `layer_inputs`, `calibrated_build`: for which text their codes are chosen.
- `open_source`, `stored_checkpoint`, `hub_source`: the place that weights come from, opened.
- `convert`, `build_plan`, `shard`, `shard_writer`, `in_place`, `shard_builder`, `manifest`, `shard_check`,
  `model_lock`, `model_use`, `store_room`, `originals`, `shard_repair`, `wanted_model`, `shard_store`: one file a layer,
  built once, checked whenever it is opened, mended from its source, removed for room when nobody uses it.
- `model_source`, `kv_shape`, `model_traits`, `inspection`: what a model is, from config and headers alone.
- `placement`, `budget`, `device`, `compute_dtype`, `model_sizes`, `disk_speed`, `calibration`, `planner`, `workspace`,
  `reserve`, `spread`, `estimate`: where every byte will live and be computed, and what a sweep will take.
- `open_model`, `pieces`, `file_reads`, `loader`, `host_memory`, `shared_memory`, `ram_tier`, `resident`,
  `embedding_rows`: what stays is brought to its home, once.
- `disk_reader`, `transfer`, `experts`, `expert_share`, `expert_room`, `expert_cache`, `expert_fetch`, `weight_stream`,
  `binding`: what does not stay, from disk or RAM to the parameters that compute, in every sweep; of experts those that
  are visited, and those visited most are kept.
- `packing`, `kv_cache`, `attention`, `layer_graphs`, `graph_recorder`, `recordable`, `streamed_head`, `sweep`: one pass
  over all layers for all sequences together; `sequence_state`, `state_pool`, `prompt_step`, `stepwise`: the same for
  families that keep states.
- `grammar`, `tool_format`, `adjustments`, `sampler`, `text`, `detokenizer`: from logits to tokens to text, in a format
  where one is asked for.
- `admission`, `sequence`, `scheduler`, `sweep_thread`, `outbox`, `engine`: who rides which sweep; `sequence_types` and
  `options` are what callers see; `embedding_job`: texts that ride along for their hidden states.
- `shared_budget`, `sweep_turns`, `engine_group`: several models on one device, in turns.
- `timeline`, `sweep_profile`, `expansion_times`, `bench_engine`, `bench`: what moved and how long it took, beside the
  limit.
- `texts`, `quality_text`, `quality_pair`, `row_logits`, `quality_figures`, `quality`: what a packed model loses, by the
  logits of many rows of a sweep.
- `out_of_memory`, `batch_limit`: what an engine does about memory that is short in a sweep.
- `auto_model`: the engine in one process, for scripts; `cli_options`, `cli`, `peer_cli`, `inspect_report`,
  `plan_target`, `plan_report`, `plan_cli`, `bench_cli`, `quality_cli`: in a shell, with `byte_size`, `progress`,
  `console_progress`.

Names that need torch are loaded when they are first used, so that a process which only speaks to an engine elsewhere
takes the plain data from here and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lamella_engine.errors import EngineError, ModelError, SequenceError
from lamella_engine.options import EngineOptions
from lamella_engine.sequence_types import (
    AnswerFormat,
    EmbeddingTerms,
    EngineCounters,
    EngineFacts,
    FinishReason,
    FormatKind,
    Pooling,
    Sampling,
    SequenceEmbeddings,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
    SweepEvents,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from lamella_engine.auto_model import AutoModel, GenerateOutput
    from lamella_engine.engine import Engine
    from lamella_engine.shard_store import ShardStore

__all__ = [
    "AnswerFormat",
    "AutoModel",
    "EmbeddingTerms",
    "Engine",
    "EngineCounters",
    "EngineError",
    "EngineFacts",
    "EngineOptions",
    "FinishReason",
    "FormatKind",
    "GenerateOutput",
    "ModelError",
    "Pooling",
    "Sampling",
    "SequenceEmbeddings",
    "SequenceError",
    "SequenceFinished",
    "SequencePrefill",
    "SequenceRequest",
    "SequenceTokens",
    "ShardStore",
    "SweepEvents",
    "TokenLogprobs",
]

_NEED_TORCH = {
    "AutoModel": "auto_model",
    "Engine": "engine",
    "GenerateOutput": "auto_model",
    "ShardStore": "shard_store",
}


def __getattr__(name: str) -> object:
    """Load what needs torch, the first time it is asked for."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
