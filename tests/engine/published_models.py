"""Families that exist as code of their own only: tiny checkpoints in their layout, and their published mathematics.

Each forward is written down from the family's own description in plain torch, whole sequence at once, and shares
nothing with the product. `test_importers` compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import embedding, linear, normalize, silu

Weights = dict[str, torch.Tensor]
Config = dict[str, Any]

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS = 512, 64, 96, 3, 4
WIDTH = HIDDEN // HEADS


@dataclass(frozen=True)
class Published:
    """A variant of a family: what its config.json says, its tensors, and the logits of a token row."""

    config: Config
    shapes: dict[str, tuple[int, ...]]
    forward: Callable[[Config, Weights, list[int]], torch.Tensor]

    def weights(self, seed: int = 0) -> Weights:
        """Seeded float32 weights; norms lie around 1."""
        numbers = torch.Generator().manual_seed(seed)
        made = {name: torch.randn(shape, generator=numbers) * 0.12 for name, shape in self.shapes.items()}
        return {name: value + 1 if _is_norm(name) else value for name, value in made.items()}

    def save(self, directory: Path, *, seed: int = 0, **changes: object) -> Path:
        """Write the checkpoint, with `changes` to its config; None takes a key away."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in (self.config | changes).items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))
        save_file(self.weights(seed), directory / "model.safetensors")
        return directory

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
        """The `count` likeliest tokens one after another, and the log-probabilities that each was chosen from."""
        tokens, chosen_from, weights = list(prompt), [], self.weights()
        for _ in range(count):
            logits = self.forward(self.config, weights, tokens)[-1]
            chosen_from.append(logits.log_softmax(-1))
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :], torch.stack(chosen_from)


def _is_norm(name: str) -> bool:
    return name.endswith(("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of [tokens, heads, width]; each key-value head serves several query heads in a row."""
    count, heads, width = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(width)
    ahead = torch.ones(count, count, dtype=torch.bool).triu(1)
    mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(ahead, -math.inf).softmax(-1), v)
    return mixed.reshape(count, heads * width)


def rotate_halves(x: torch.Tensor, base: float, divisor: float = 1.0) -> torch.Tensor:
    """Rotary positions in which entry i and entry i + width/2 make a pair."""
    count, _, width = x.shape
    angles = torch.outer(torch.arange(count) / divisor, base ** (-torch.arange(0, width, 2) / width))[:, None]
    first, second = x[..., : width // 2], x[..., width // 2 :]
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, -1)


def rotate_pairs_of_first_half(x: torch.Tensor, base: float, divisor: float) -> torch.Tensor:
    """Rotary positions on the first half of the width, in which neighbours make a pair."""
    count, heads, width = x.shape
    part = width // 2
    angles = torch.outer(torch.arange(count) / divisor, base ** (-torch.arange(0, part, 2) / part))[:, None]
    pairs = x[..., :part].reshape(count, heads, part // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()), -1)
    return torch.cat((turned.reshape(count, heads, part), x[..., part:]), -1)


def qwen_forward(config: Config, w: Weights, tokens: list[int]) -> torch.Tensor:
    epsilon = config["layer_norm_epsilon"]
    x = embedding(torch.tensor(tokens), w["transformer.wte.weight"])
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        seen = rms_norm(x, w[at + "ln_1.weight"], epsilon)
        fused = linear(seen, w[at + "attn.c_attn.weight"], w[at + "attn.c_attn.bias"])
        q, k, v = (part.reshape(-1, HEADS, WIDTH) for part in fused.chunk(3, -1))
        base = config["rotary_emb_base"]
        x = x + linear(attend(rotate_halves(q, base), rotate_halves(k, base), v), w[at + "attn.c_proj.weight"])
        seen = rms_norm(x, w[at + "ln_2.weight"], epsilon)
        inner = linear(seen, w[at + "mlp.w1.weight"]) * silu(linear(seen, w[at + "mlp.w2.weight"]))
        x = x + linear(inner, w[at + "mlp.c_proj.weight"])
    return linear(rms_norm(x, w["transformer.ln_f.weight"], epsilon), w["lm_head.weight"])


def _llama_block(config: Config, w: Weights, at: str, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    x = x + linear(mixed, w[at + "self_attn.o_proj.weight"], w.get(at + "self_attn.o_proj.bias"))
    seen = rms_norm(x, w[at + "post_attention_layernorm.weight"], config["rms_norm_eps"])
    gate, up = (linear(seen, w[f"{at}mlp.{part}_proj.weight"]) for part in ("gate", "up"))
    return x + linear(silu(gate) * up, w[at + "mlp.down_proj.weight"])


def internlm_forward(config: Config, w: Weights, tokens: list[int]) -> torch.Tensor:
    base = config["rotary"]["base"]
    x = embedding(torch.tensor(tokens), w["model.embed_tokens.weight"])
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        seen = rms_norm(x, w[at + "input_layernorm.weight"], config["rms_norm_eps"])
        q, k, v = (
            linear(seen, w[f"{at}self_attn.{part}_proj.weight"], w.get(f"{at}self_attn.{part}_proj.bias")).reshape(
                -1, HEADS, WIDTH
            )
            for part in "qkv"
        )
        x = _llama_block(config, w, at, x, attend(rotate_halves(q, base), rotate_halves(k, base), v))
    return linear(rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"]), w["lm_head.weight"])


def baichuan_forward(config: Config, w: Weights, tokens: list[int]) -> torch.Tensor:
    x = embedding(torch.tensor(tokens), w["model.embed_tokens.weight"])
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        seen = rms_norm(x, w[at + "input_layernorm.weight"], config["rms_norm_eps"])
        q, k, v = linear(seen, w[at + "self_attn.W_pack.weight"]).reshape(-1, 3, HEADS, WIDTH).unbind(1)
        x = _llama_block(config, w, at, x, attend(rotate_halves(q, 10000.0), rotate_halves(k, 10000.0), v))
    head = w["lm_head.weight"]
    if config["architectures"] == ["BaichuanForCausalLM"]:
        head = normalize(head)
    return linear(rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"]), head)


def linear_bias_slopes(heads: int) -> list[float]:
    """Powers of one half, evenly spread down to the eighth; of 6 heads 4 are of this series, 2 of that of 8 heads."""
    return {4: [1 / 4, 1 / 16, 1 / 64, 1 / 256], 6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]}[heads]


def baichuan_13b_forward(config: Config, w: Weights, tokens: list[int]) -> torch.Tensor:
    count, heads = len(tokens), config["num_attention_heads"]
    # A key's score grows with its position, the same for every query: what counts in a softmax is the distance.
    rising = torch.tensor(linear_bias_slopes(heads))[:, None, None] * torch.arange(count)
    biases = rising + torch.full((count, count), -math.inf).triu(1)
    x = embedding(torch.tensor(tokens), w["model.embed_tokens.weight"])
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        seen = rms_norm(x, w[at + "input_layernorm.weight"], config["rms_norm_eps"])
        q, k, v = linear(seen, w[at + "self_attn.W_pack.weight"]).reshape(count, 3, heads, WIDTH).unbind(1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(WIDTH) + biases
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(count, heads * WIDTH)
        x = _llama_block(config, w, at, x, mixed)
    head = normalize(w["lm_head.weight"]) if "z_loss_weight" in config else w["lm_head.weight"]
    return linear(rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"]), head)


def internlm2_forward(config: Config, w: Weights, tokens: list[int]) -> torch.Tensor:
    epsilon, base, groups = config["rms_norm_eps"], config["rope_theta"], config["num_key_value_heads"]
    scaling = config.get("rope_scaling") or {}
    divisor = scaling["factor"] if scaling.get("type") == "linear" else 1.0
    x = embedding(torch.tensor(tokens), w["model.tok_embeddings.weight"])
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        seen = rms_norm(x, w[at + "attention_norm.weight"], epsilon)
        fused = linear(seen, w[at + "attention.wqkv.weight"], w.get(at + "attention.wqkv.bias"))
        grouped = fused.reshape(-1, groups, HEADS // groups + 2, WIDTH)
        q = grouped[:, :, :-2].reshape(-1, HEADS, WIDTH)
        k, v = grouped[:, :, -2], grouped[:, :, -1]
        mixed = attend(rotate_halves(q, base, divisor), rotate_halves(k, base, divisor), v)
        x = x + linear(mixed, w[at + "attention.wo.weight"], w.get(at + "attention.wo.bias"))
        seen = rms_norm(x, w[at + "ffn_norm.weight"], epsilon)
        inner = silu(linear(seen, w[at + "feed_forward.w1.weight"])) * linear(seen, w[at + "feed_forward.w3.weight"])
        x = x + linear(inner, w[at + "feed_forward.w2.weight"])
    return linear(rms_norm(x, w["model.norm.weight"], epsilon), w["output.weight"])


def chatglm_forward(config: Config, w: Weights, tokens: list[int]) -> torch.Tensor:
    epsilon, ratio = config["layernorm_epsilon"], config.get("rope_ratio", 1.0)
    is_second = "chatglm2" in config.get("_name_or_path", "")
    base, divisor = (10000.0, ratio) if is_second else (10000.0 * ratio, 1.0)
    x = embedding(torch.tensor(tokens), w["transformer.embedding.word_embeddings.weight"])
    for layer in range(LAYERS):
        at = f"transformer.encoder.layers.{layer}."
        seen = rms_norm(x, w[at + "input_layernorm.weight"], epsilon)
        fused = linear(
            seen, w[at + "self_attention.query_key_value.weight"], w[at + "self_attention.query_key_value.bias"]
        )
        if config["multi_query_attention"]:
            keys = config["multi_query_group_num"] * WIDTH
            q, k, v = (part.reshape(len(tokens), -1, WIDTH) for part in fused.split([HIDDEN, keys, keys], -1))
        else:
            q, k, v = fused.reshape(len(tokens), HEADS, 3 * WIDTH).chunk(3, -1)
        q, k = (rotate_pairs_of_first_half(part, base, divisor) for part in (q, k))
        x = x + linear(attend(q, k, v), w[at + "self_attention.dense.weight"])
        seen = rms_norm(x, w[at + "post_attention_layernorm.weight"], epsilon)
        first, second = linear(seen, w[at + "mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        x = x + linear(silu(first) * second, w[at + "mlp.dense_4h_to_h.weight"])
    x = rms_norm(x, w["transformer.encoder.final_layernorm.weight"], epsilon)
    return linear(x, w["transformer.output_layer.weight"])


def _shapes(
    outside: dict[str, tuple[int, ...]], at: str, layer: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return outside | {at.format(index) + name: shape for index in range(LAYERS) for name, shape in layer.items()}


TABLE, ROW, SQUARE, UP, DOWN = (VOCABULARY, HIDDEN), (HIDDEN,), (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
_LLAMA_SIZES: Config = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 96,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
_LLAMA_TENSORS: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": ROW, "post_attention_layernorm.weight": ROW, "self_attn.o_proj.weight": SQUARE,
    "mlp.gate_proj.weight": UP, "mlp.up_proj.weight": UP, "mlp.down_proj.weight": DOWN,
}  # fmt: skip
_LLAMA_OUTSIDE = {"model.embed_tokens.weight": TABLE, "model.norm.weight": ROW, "lm_head.weight": TABLE}


def _auto_map(module: str, name: str) -> Config:
    return {"AutoConfig": f"configuration_{module}.Config", "AutoModelForCausalLM": f"modeling_{module}.{name}"}


QWEN = Published(
    {
        "architectures": ["QWenLMHeadModel"], "auto_map": _auto_map("qwen", "QWenLMHeadModel"), "model_type": "qwen",
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * INNER, "kv_channels": WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "layer_norm_epsilon": 1e-6, "no_bias": True,
        "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 64,
        "max_position_embeddings": 128, "use_dynamic_ntk": True, "use_logn_attn": True, "bf16": True,
        "tie_word_embeddings": False, "tokenizer_type": "QWenTokenizer", "onnx_safe": None,
    },
    _shapes(
        {"transformer.wte.weight": TABLE, "transformer.ln_f.weight": ROW, "lm_head.weight": TABLE},
        "transformer.h.{}.",
        {
            "ln_1.weight": ROW, "ln_2.weight": ROW, "attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
            "attn.c_attn.bias": (3 * HIDDEN,), "attn.c_proj.weight": SQUARE, "mlp.w1.weight": UP, "mlp.w2.weight": UP,
            "mlp.c_proj.weight": DOWN,
        },
    ),
    qwen_forward,
)  # fmt: skip


def _internlm(has_bias: bool) -> Published:
    parts = [f"self_attn.{part}_proj" for part in "qkvo"]
    biases: dict[str, tuple[int, ...]] = {f"{part}.bias": ROW for part in parts} if has_bias else {}
    return Published(
        _LLAMA_SIZES
        | {"architectures": ["InternLMForCausalLM"], "auto_map": _auto_map("internlm", "InternLMForCausalLM")}
        | {"model_type": "internlm", "bias": has_bias, "rotary": {"base": 10000, "type": "dynamic"}},
        _shapes(
            _LLAMA_OUTSIDE,
            "model.layers.{}.",
            _LLAMA_TENSORS
            | {f"{part}.weight": SQUARE for part in parts}
            | biases
            | {"self_attn.rotary_emb.inv_freq": (8,)},
        ),
        internlm_forward,
    )


def _internlm2(has_bias: bool, scaling: Config | None) -> Published:
    groups = 2
    fused = (HEADS + 2 * groups) * WIDTH
    biases: dict[str, tuple[int, ...]] = {"attention.wqkv.bias": (fused,), "attention.wo.bias": ROW}
    return Published(
        _LLAMA_SIZES
        | {"architectures": ["InternLM2ForCausalLM"], "auto_map": _auto_map("internlm2", "InternLM2ForCausalLM")}
        | {"model_type": "internlm2", "bias": has_bias, "num_key_value_heads": groups, "rope_theta": 1000000}
        | {"rope_scaling": scaling, "attn_implementation": "eager"},
        _shapes(
            {"model.tok_embeddings.weight": TABLE, "model.norm.weight": ROW, "output.weight": TABLE},
            "model.layers.{}.",
            {
                "attention_norm.weight": ROW, "ffn_norm.weight": ROW, "attention.wqkv.weight": (fused, HIDDEN),
                "attention.wo.weight": SQUARE, "feed_forward.w1.weight": UP, "feed_forward.w3.weight": UP,
                "feed_forward.w2.weight": DOWN, **(biases if has_bias else {}),
            },
        ),
        internlm2_forward,
    )  # fmt: skip


def _baichuan(name: str) -> Published:
    return Published(
        _LLAMA_SIZES
        | {"architectures": [name], "auto_map": _auto_map("baichuan", name), "model_type": "baichuan"}
        | {"model_max_length": 96, "gradient_checkpointing": False},
        _shapes(_LLAMA_OUTSIDE, "model.layers.{}.", _LLAMA_TENSORS | {"self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN)}),
        baichuan_forward,
    )


def _baichuan_13b(heads: int, **changes: object) -> Published:
    hidden = heads * WIDTH
    sizes = {key: value for key, value in _LLAMA_SIZES.items() if key != "max_position_embeddings"}
    widths = {HIDDEN: hidden}
    shapes = _shapes(_LLAMA_OUTSIDE, "model.layers.{}.", _LLAMA_TENSORS)
    packed = {f"model.layers.{layer}.self_attn.W_pack.weight": (3 * hidden, hidden) for layer in range(LAYERS)}
    return Published(
        sizes
        | {"architectures": ["BaichuanForCausalLM"], "auto_map": _auto_map("baichuan", "BaichuanForCausalLM")}
        | {"model_type": "baichuan", "hidden_size": hidden, "num_attention_heads": heads, "model_max_length": 96}
        | changes,
        {name: tuple(widths.get(size, size) for size in shape) for name, shape in shapes.items()} | packed,
        baichuan_13b_forward,
    )


def _chatglm(groups: int | None, **changes: object) -> Published:
    fused = HIDDEN + 2 * (groups or HEADS) * WIDTH
    return Published(
        {
            "architectures": ["ChatGLMModel"], "model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b",
            "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, "num_layers": LAYERS,
            "padded_vocab_size": VOCABULARY, "hidden_size": HIDDEN, "ffn_hidden_size": INNER, "kv_channels": WIDTH,
            "num_attention_heads": HEADS, "seq_length": 96, "layernorm_epsilon": 1e-5, "rmsnorm": True,
            "apply_residual_connection_post_layernorm": False, "post_layer_norm": True, "add_bias_linear": False,
            "add_qkv_bias": True, "multi_query_attention": groups is not None, "multi_query_group_num": groups or 1,
            "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "original_rope": True,
            "fp32_residual_connection": False, "quantization_bit": 0, "pre_seq_len": None, "prefix_projection": False,
            "interleaved_qkv": False, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        } | changes,
        _shapes(
            {
                "transformer.embedding.word_embeddings.weight": TABLE, "transformer.output_layer.weight": TABLE,
                "transformer.encoder.final_layernorm.weight": ROW, "transformer.rotary_pos_emb.inv_freq": (4,),
            },
            "transformer.encoder.layers.{}.",
            {
                "input_layernorm.weight": ROW, "post_attention_layernorm.weight": ROW,
                "self_attention.query_key_value.weight": (fused, HIDDEN),
                "self_attention.query_key_value.bias": (fused,), "self_attention.dense.weight": SQUARE,
                "mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN), "mlp.dense_4h_to_h.weight": DOWN,
            },
        ),
        chatglm_forward,
    )  # fmt: skip


PUBLISHED = {
    "QWen": QWEN,
    "InternLM": _internlm(has_bias=True),
    "InternLM without biases": _internlm(has_bias=False),
    "InternLM2": _internlm2(has_bias=False, scaling={"type": "dynamic", "factor": 2.0}),
    "InternLM2 with biases, scaled": _internlm2(has_bias=True, scaling={"type": "linear", "factor": 4.0}),
    "Baichuan": _baichuan("BaiChuanForCausalLM"),
    "Baichuan2": _baichuan("BaichuanForCausalLM"),
    "Baichuan 13B": _baichuan_13b(heads=6, _name_or_path="baichuan-inc/Baichuan-13B-Base"),
    "Baichuan2 13B": _baichuan_13b(heads=4, z_loss_weight=0),
    "ChatGLM2": _chatglm(groups=2),
    "ChatGLM2 32k": _chatglm(groups=2, _name_or_path="THUDM/chatglm2-6b-32k", rope_ratio=8),
    "ChatGLM3 32k": _chatglm(groups=1, _name_or_path="THUDM/chatglm3-6b-32k", rope_ratio=50),
    "ChatGLM without groups": _chatglm(groups=None),
}
