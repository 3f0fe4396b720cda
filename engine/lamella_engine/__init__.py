"""The layer-streaming engine: runs language models whose weights do not fit the device, several sequences a sweep.

In the order data flows through them:

- `names`, `hub`, `weight_source`, `safetensors_header`, `checkpoint`, `gguf_header`, `gguf_checkpoint`: where a model
  comes from.
- `architecture`: the module tree without weights, and whether it can run here.
- `convert`, `shard`, `shard_writer`, `shard_builder`, `manifest`, `shard_check`, `model_lock`, `shard_store`: one file
  per layer, built once, checked whenever it is opened.
- `inspection`: what a model is, from config and headers alone.
- `reader`, `slots`, `binding`: a layer's bytes from disk to the parameters that compute.
- `packing`, `attention`, `kv_cache`, `sweep`: one pass over all layers for all sequences together.
- `sampler`, `text`, `detokenizer`: from logits to tokens to text.
- `sequence`, `scheduler`, `engine`: who rides which sweep; `sequence_types` and `options` are what callers see.
- `auto_model`: the engine in one process, for scripts.
"""

from lamella_engine.auto_model import AutoModel, GenerateOutput
from lamella_engine.engine import Engine
from lamella_engine.errors import EngineError, ModelError, SequenceError
from lamella_engine.options import EngineOptions
from lamella_engine.sequence_types import (
    EngineCounters,
    EngineFacts,
    FinishReason,
    Sampling,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
    SweepEvents,
    TokenLogprobs,
)
from lamella_engine.shard_store import ShardStore

__all__ = [
    "AutoModel",
    "Engine",
    "EngineCounters",
    "EngineError",
    "EngineFacts",
    "EngineOptions",
    "FinishReason",
    "GenerateOutput",
    "ModelError",
    "Sampling",
    "SequenceError",
    "SequenceFinished",
    "SequencePrefill",
    "SequenceRequest",
    "SequenceTokens",
    "ShardStore",
    "SweepEvents",
    "TokenLogprobs",
]
