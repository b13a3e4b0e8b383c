"""Tiny files of Distributed-Llama, laid out as its converters do: models (`.m`) and tokenizers (`.t`)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants
from safetensors.numpy import load_file

from tests.weights.build import permuted

Array = np.ndarray
ARCHITECTURES = {"llama": 0xABCD00, "qwen3": 0xABCD01, "qwen3_moe": 0xABCD02}
KINDS = {"f32": (0, Type.F32), "f16": (1, Type.F16), "q40": (2, Type.Q4_0), "q80": (3, Type.Q8_0)}
KEYS = (
    "version", "arch_type", "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "n_experts", "n_active_experts",
    "vocab_size", "max_seq_len", "hidden_act", "rope_theta", "weights_float_type", "rope_scaling_factor",
    "rope_scaling_low_freq_factor", "rope_scaling_high_freq_factor", "rope_scaling_orig_max_seq_len", "rope_type",
    "head_dim", "norm_epsilon", "moe_hidden_dim",
)  # fmt: skip
TOKENIZER_KEYS = {
    "version": 0, "vocab_size": 1, "max_token_length": 2, "bos_id": 3, "eos_id": 4, "pad_id": 5, "chat_eos_id": 6,
    "chat_template": 7, "chat_stop": 8, "n_eos_tokens": 9, "add_bos": 10,
}  # fmt: skip


def header_of(config: dict[str, Any], kind: str) -> dict[str, int]:
    """The header's values for a configuration with Hugging Face's keys."""
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    values = {
        "version": 0,
        "arch_type": ARCHITECTURES[config["model_type"]],
        "hidden_act": 1,
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "weights_float_type": KINDS[kind][0],
        "max_seq_len": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "n_experts": config.get("num_experts", 0),
        "n_active_experts": config.get("num_experts_per_tok", 0),
        "rope_theta": rope["rope_theta"],
        "norm_epsilon": {1e-5: 5, 1e-6: 6}[config["rms_norm_eps"]],
    }
    if "head_dim" in config:
        values["head_dim"] = config["head_dim"]
    if rope.get("rope_type") == "llama3":
        values |= {
            "rope_scaling_factor": rope["factor"],
            "rope_scaling_low_freq_factor": rope["low_freq_factor"],
            "rope_scaling_high_freq_factor": rope["high_freq_factor"],
            "rope_scaling_orig_max_seq_len": rope["original_max_position_embeddings"],
            "rope_type": 2,
        }
    if "moe_intermediate_size" in config:
        values["moe_hidden_dim"] = config["moe_intermediate_size"]
    return {name: int(value) for name, value in values.items()}


def header_bytes(values: dict[str | int, int], magic: int = 0xA00ABCD) -> bytes:
    """The magic number, the size, and the pairs; keys may also be numbers."""
    numbers = [key if isinstance(key, int) else KEYS.index(key) for key in values]
    pairs = b"".join(struct.pack("<ii", *pair) for pair in zip(numbers, values.values(), strict=True))
    return struct.pack("<ii", magic, 8 + len(pairs)) + pairs


def tensors_of(config: dict[str, Any], weights: dict[str, Array]) -> Iterator[tuple[Array, bool]]:
    """Tensors in the file's order, and whether they have the type of weights; else they are float32."""
    yield weights["model.embed_tokens.weight"], False
    llama = config["model_type"] == "llama"
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            value = weights[f"{at}self_attn.{name}_proj.weight"]
            yield permuted(value, config[heads]) if llama else value, True
        yield weights[f"{at}self_attn.v_proj.weight"], True
        yield weights[f"{at}self_attn.o_proj.weight"], True
        stems = [f"{at}mlp."]
        if "num_experts" in config:
            yield weights[f"{at}mlp.gate.weight"], False
            stems = [f"{at}mlp.experts.{expert}." for expert in range(config["num_experts"])]
        for stem in stems:
            for name in ("gate", "down", "up"):
                yield weights[f"{stem}{name}_proj.weight"], True
        if not llama:
            yield weights[f"{at}self_attn.q_norm.weight"], False
            yield weights[f"{at}self_attn.k_norm.weight"], False
        yield weights[f"{at}input_layernorm.weight"], False
        yield weights[f"{at}post_attention_layernorm.weight"], False
    yield weights["model.norm.weight"], False
    yield weights.get("lm_head.weight", weights["model.embed_tokens.weight"]), True


def write_model(path: Path, config: dict[str, Any], weights: dict[str, Array], kind: str = "f32") -> Path:
    """A model file of float32 weights by their Hugging Face names."""
    with path.open("wb") as file:
        file.write(header_bytes(dict(header_of(config, kind))))
        for value, typed in tensors_of(config, weights):
            file.write(quants.quantize(value, KINDS[kind][1] if typed else Type.F32).tobytes())
    return path


def convert(folder: Path, path: Path, kind: str = "f32") -> Path:
    """The model file of a tiny Hugging Face directory."""
    config = json.loads((folder / "config.json").read_text())
    return write_model(path, config, load_file(folder / "model.safetensors"), kind)


def write_tokenizer(
    path: Path,
    tokens: list[bytes],
    bos: int,
    ends: list[int],
    scores: list[float] | None = None,
    template: bytes = b"",
    add_bos: bool = True,
    **more: int,
) -> Path:
    """A tokenizer file; `more` are further values of its header. Tokens' scores are their negative ids by default."""
    values = {
        "bos_id": bos,
        "version": 1,
        "vocab_size": len(tokens),
        "max_token_length": max(map(len, tokens)),
    }
    values |= {"chat_template": len(template)} if template else {}
    values |= {"n_eos_tokens": len(ends), "add_bos": int(add_bos)} | more
    pairs = b"".join(struct.pack("<ii", TOKENIZER_KEYS[key], value) for key, value in values.items())
    scores = scores if scores is not None else [-float(id) for id in range(len(tokens))]
    parts = [struct.pack("<ii", 0x567124, 8 + len(pairs)), pairs, bytes(more.get("chat_stop", 0)), template]
    parts += [struct.pack("<i", end) for end in ends]
    parts += [
        struct.pack("<fi", score, len(token)) + token for token, score in zip(tokens, scores, strict=True)
    ]
    path.write_bytes(b"".join(parts))
    return path


def tokens_of(folder: Path) -> tuple[list[bytes], int, int]:
    """The tokens of a tiny model's byte-level tokenizer.json, its special ones last, and the new ids of BOS and EOS."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    described = json.loads((folder / "tokenizer.json").read_text())
    special = [token["content"] for token in described["added_tokens"]]
    vocab = sorted(described["model"]["vocab"], key=described["model"]["vocab"].__getitem__)
    tokens = [bytes(byte_of[char] for char in token) for token in vocab if token not in special]
    first = len(tokens)
    special.sort(key=lambda token: token != "<s>")  # BOS is the first special one
    return tokens + [token.encode() for token in special], first, first + special.index("</s>")
