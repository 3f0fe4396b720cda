"""Tiny GGUF files, written with the format's own library from the tiny checkpoints, as its converters would."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy
import torch
from safetensors.torch import load_file

from tests import tiny_models

QUANTISED = gguf.GGMLQuantizationType.Q8_0

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_ROOT_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def save_llama_gguf(path: Path, *, quantisation: gguf.GGMLQuantizationType = QUANTISED) -> Path:
    """Write the tiny Llama with its tokenizer; matrices as `quantisation`, norms as float32."""
    return _save(path, tiny_models.save_tiny_llama(path.parent / "llama-source"), "llama", quantisation)


def save_moe_gguf(path: Path) -> Path:
    """Write a tiny Qwen3 mixture of experts, whose experts lie stacked in the file."""
    source = path.parent / "moe-source"
    tokenizer = tiny_models.save_tokenizer(source)
    # The file format's width of an expert is not read back by transformers, which assumes 768.
    shape = tiny_models.FAMILIES["qwen3_moe"] | {"vocab_size": len(tokenizer), "moe_intermediate_size": 768}
    tiny_models.save_checkpoint(source, "qwen3_moe", shape)
    return _save(path, source, "qwen3moe", QUANTISED)


def _save(path: Path, source: Path, architecture: str, quantisation: gguf.GGMLQuantizationType) -> Path:
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    _write_config(writer, config)
    _write_tokenizer(writer, source)
    for name, tensor in _renamed(load_file(source / "model.safetensors"), config).items():
        values = tensor.float().numpy()
        kind = quantisation if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_config(writer: gguf.GGUFWriter, config: dict[str, int]) -> None:
    writer.add_name("Tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    if num_experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _write_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny_models.CHAT_TEMPLATE)


def _renamed(tensors: dict[str, torch.Tensor], config: dict[str, int]) -> dict[str, torch.Tensor]:
    """Names and layouts of the file format: query and key rows of a Llama interleaved, experts stacked."""
    renamed: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            stack = f"blk.{parts[2]}.ffn_{parts[6].removesuffix('_proj')}_exps.weight"
            experts.setdefault(stack, {})[int(parts[5])] = tensor
        elif parts[1] == "layers":
            short = _LAYER_NAMES[".".join(parts[3:-1])]
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(short)
            is_llama = config["model_type"] == "llama"  # type: ignore[comparison-overlap] # JSON: this one is text
            value = _interleaved(tensor, config[heads]) if heads and is_llama else tensor
            renamed[f"blk.{parts[2]}.{short}.weight"] = value
        else:
            renamed[f"{_ROOT_NAMES['.'.join(parts[:-1])]}.weight"] = tensor
    stacked = {name: torch.stack([parts[index] for index in sorted(parts)]) for name, parts in experts.items()}
    return renamed | stacked


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.from_numpy(
        numpy.ascontiguousarray(rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape).numpy())
    )
