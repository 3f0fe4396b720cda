"""Tiny seeded checkpoints, written as a hub would serve them: one Llama with a tokenizer, and many families without.

Owns their shapes and weights; `fixtures.models` says how long they live.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CONTEXT_TOKENS = 512
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SENTENCES = [
    "The river runs slowly past the mill, and the miller counts the sacks of flour by the door.",
    "Paris is the capital of France; Rome is the capital of Italy; Berlin is the capital of Germany.",
    "A small lamp stood on the table beside three green apples, a knife and an unopened letter.",
    "In the morning the fishermen mended their nets while children ran along the cold beach.",
    "def add(left, right):\n    return left + right\n\nprint(add(19, 23))\n",
    "Ein kleiner Vogel saß auf dem Dach — naïve façade, jalapeño, Ωmega, こんにちは, 🍎🍏.",
    "Every layer is read once for all sequences together, and then the next one is read.",
    "One, two, three, four, five, six, seven, eight, nine, ten; 1 2 3 5 8 13 21 34 55 89.",
]

_DENSE: dict[str, object] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WIDE_HEAD: dict[str, object] = _DENSE | {"head_dim": 16}
_QWEN_EXPERTS: dict[str, object] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}  # fmt: skip
_ROUTED: dict[str, object] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT: dict[str, object] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_RECURRENT: dict[str, object] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA2: dict[str, object] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
}  # fmt: skip
_SPECIAL: dict[str, object] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WINDOW: dict[str, object] = {"sliding_window": 8}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": _DENSE,
    "mistral": _DENSE | _WINDOW,
    "mixtral": _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": _DENSE,
    "qwen3": _WIDE_HEAD,
    "qwen2_moe": _DENSE | _QWEN_EXPERTS,
    "qwen3_moe": _WIDE_HEAD | _QWEN_EXPERTS,
    "glm": _WIDE_HEAD,
    "glm4": _WIDE_HEAD,
    "glm4_moe": _WIDE_HEAD | _ROUTED,
    "gemma": _WIDE_HEAD,
    "gemma2": _WIDE_HEAD | _WINDOW,
    "gemma3_text": _WIDE_HEAD | _WINDOW,
    "gemma4_text": _WIDE_HEAD | _WINDOW | {"global_head_dim": 16, "vocab_size_per_layer_input": 128},
    "phi": _DENSE,
    "phi3": _DENSE,
    "phimoe": _DENSE | {"num_local_experts": 4},
    "gpt_oss": _WIDE_HEAD | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "internlm3": _WIDE_HEAD,
    "olmo2": _DENSE,
    "granite": _DENSE,
    "cohere2": _DENSE | _WINDOW,
    "stablelm": _DENSE,
    "starcoder2": _DENSE,
    "smollm3": _DENSE,
    "nemotron": _WIDE_HEAD,
    "qwen3_next": _WIDE_HEAD | _RECURRENT | _QWEN_EXPERTS,
    "qwen3_5_text": _WIDE_HEAD | _RECURRENT,
    "deepseek_v3": _DENSE | _LATENT | _ROUTED,
    "ministral3": _DENSE,
    "olmoe": _DENSE | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _DENSE | _LATENT | _ROUTED,
    "minimax": _WIDE_HEAD
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"] * 2}
    | {"block_size": 8},
    "gpt_neox": _DENSE,
    "falcon": _SPECIAL
    | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "new_decoder_architecture": False},
    "gpt2": _SPECIAL | {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "opt": _SPECIAL
    | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}
    | {"max_position_embeddings": 256},
    "bloom": _SPECIAL | {"hidden_size": 64, "n_layer": 4, "n_head": 4},
    "llama4_text": _WIDE_HEAD
    | {"attention_chunk_size": 8, "intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0]}
    | {"num_local_experts": 4, "num_experts_per_tok": 1},
    "doge": _DENSE,
    "diffllama": _DENSE,
    "mamba": _SPECIAL | {"hidden_size": 64, "num_hidden_layers": 4, "state_size": 8},
    "mamba2": _SPECIAL
    | {"hidden_size": 64, "num_hidden_layers": 4, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2}
    | {"chunk_size": 8},
    "bamba": _DENSE | _MAMBA2 | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _WIDE_HEAD | _MAMBA2 | {"mamba_d_ssm": 128},
    "recurrent_gemma": _WIDE_HEAD
    | {"attention_window_size": 8, "block_types": ["recurrent", "attention"], "lru_width": 64},
    "rwkv": _SPECIAL | {"hidden_size": 64, "num_hidden_layers": 4, "rescale_every": 2},
    "openai-gpt": _SPECIAL | {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "longcat_flash": _DENSE
    | _LATENT
    | {
        "head_dim": 8,
        "num_hidden_layers": 8,
        "num_layers": 4,
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
        "moe_topk": 2,
    }
    | {"n_routed_experts": 4, "zero_expert_num": 1},
}

# Families that transformers builds and that cannot be run, each for a reason of its own.
REFUSED: dict[str, dict[str, object]] = {
    "zamba": _DENSE
    | {"num_hidden_layers": 6, "num_key_value_heads": 4, "attn_layer_period": 3, "attn_layer_offset": 2}
    | {"n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "bert": _DENSE,
}


def save_family(family: str, directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a random checkpoint of one of FAMILIES (no tokenizer) as its hub layout has it; return `directory`.

    Its greedy text varies from token to token, and a token depends on those far before it.
    """
    shape = (FAMILIES | REFUSED)[family]
    return save_checkpoint(directory, family, shape, dtype=dtype, seed=seed, std=0.2, keeps_scales=True)


def save_checkpoint(
    directory: Path,
    family: str,
    shape: dict[str, object],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    std: float = 0.08,
    max_shard_size: str = "5GB",
    keeps_scales: bool = False,
) -> Path:
    """Write a random checkpoint of `family` with the config values `shape`; return `directory`.

    With `keeps_scales`, norms, biases and decay rates stay near what the family begins with.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if keeps_scales and (parameter.dim() == 1 or "A_log" in name):
            parameter.data.add_(torch.randn_like(parameter) * std / 4)
            continue
        is_norm = parameter.dim() == 1 and name.endswith("norm.weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm and family == "llama" else 0.0, std=std)
    model.tie_weights()
    # Sampling defaults of some families do not pass transformers' own check when saved.
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on SENTENCES and write it with special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=[PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return fast


def save_tiny_llama(directory: Path, *, seed: int = 0, layers: int = 4, max_shard_size: str = "5GB") -> Path:
    """Write a Llama of `layers` layers (hidden 64, about 450 tokens, context 512) with its tokenizer; return its path.

    Its greedy text varies from token to token; it never ends on purpose within a few dozen tokens.
    """
    tokenizer = save_tokenizer(directory)
    shape: dict[str, object] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return save_checkpoint(directory, "llama", shape, seed=seed, std=0.3, max_shard_size=max_shard_size)
