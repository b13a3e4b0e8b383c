"""Small models written for these tests: random weights in safetensors and GGUF files, and what they should read as."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mpillm.model.config import ModelConfig
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec

Array = np.ndarray
NORM = NormSpec(1e-6)
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass
class Tiny:
    """The sizes and switches of a tiny model."""

    hidden: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    vocab: int = 100
    n_experts: int = 0
    moe_intermediate: int = 0
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dense_layers: tuple[int, ...] = ()
    seed: int = 0
    state: dict[str, Array] = field(default_factory=dict)

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        return tuple(self.n_experts > 0 and layer not in self.dense_layers for layer in range(self.n_layers))

    def model(self, unit: int) -> ModelConfig:
        """The configuration of it, where columns are cut in blocks of `unit`."""
        mixer = AttentionSpec(
            self.n_heads,
            self.n_kv_heads,
            self.head_dim,
            self.head_dim**-0.5,
            None,
            qkv_bias=self.attention_bias,
            o_bias=self.o_bias,
            qk_norm=NORM if self.qk_norm else None,
        )
        norms = Norms(NORM)
        layers = tuple(
            LayerSpec(
                mixer,
                ExpertsSpec(self.n_experts, self.moe_intermediate, RouterSpec(1))
                if experts
                else MlpSpec(self.intermediate, bias=self.mlp_bias),
                norms,
                norms,
            )
            for experts in self.moe_layers
        )
        return ModelConfig("Tiny", self.hidden, self.vocab, layers, NORM, 512, block=unit)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
        }

    def weights(self) -> dict[str, Array]:
        """All tensors by their Hugging Face names, float32, drawn once."""
        if self.state:
            return self.state
        random = np.random.default_rng(self.seed)
        d, q, kv = self.hidden, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, d),
            "model.norm.weight": (d,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, d)
        for layer in range(self.n_layers):
            at = f"model.layers.{layer}."
            shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,)}
            for name, n, k in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
                shapes[f"{at}self_attn.{name}_proj.weight"] = (n, k)
                if self.o_bias if name == "o" else self.attention_bias:
                    shapes[f"{at}self_attn.{name}_proj.bias"] = (n,)
            if self.qk_norm:
                shapes |= {f"{at}self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
            if self.moe_layers[layer]:
                shapes[at + "mlp.gate.weight"] = (self.n_experts, d)
                for expert in range(self.n_experts):
                    shapes |= self._ffn(f"{at}mlp.experts.{expert}.", self.moe_intermediate)
            else:
                shapes |= self._ffn(f"{at}mlp.", self.intermediate)
        for name, shape in shapes.items():
            self.state[name] = (0.5 * random.standard_normal(shape)).astype(np.float32)
        return self.state

    def _ffn(self, at: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, n, k in (
            ("gate", width, self.hidden),
            ("up", width, self.hidden),
            ("down", self.hidden, width),
        ):
            shapes[f"{at}{name}_proj.weight"] = (n, k)
            if self.mlp_bias:
                shapes[f"{at}{name}_proj.bias"] = (n,)
        return shapes


def write_hf(
    path: Path,
    tensors: dict[str, Array],
    config: dict[str, Any],
    dtype: str = "F32",
    shards: int = 1,
) -> Path:
    """A Hugging Face directory with these tensors, in one safetensors file or several with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    stored = {
        name: np.ascontiguousarray(value.astype(DTYPES[dtype]) if value.dtype == np.float32 else value)
        for name, value in tensors.items()
    }
    if shards == 1:
        save_file(stored, path / "model.safetensors")
        return path
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(stored.items())[shard::shards])
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
GGUF_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def permuted(rows: Array, heads: int) -> Array:
    """convert_hf_to_gguf.py's `permute`: the halves of each head interleaved."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(model: Tiny, arch: str, stacked: bool = True) -> dict[str, Array]:
    """A model's tensors under their GGUF names, q and k permuted where the architecture has it so."""
    found: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    for name, value in model.weights().items():
        if name in GGUF_GLOBAL:
            found[GGUF_GLOBAL[name]] = value
            continue
        _, _, layer, rest = name.split(".", 3)
        stem, kind = rest.rsplit(".", 1)
        if ".experts." in stem:
            _, _, expert, role = stem.split(".")
            role = GGUF_NAMES[f"mlp.{role}"]
            if stacked:
                experts.setdefault(f"blk.{layer}.{role}_exps.weight", []).append(value)
            else:
                found[f"blk.{layer}.{role}.{expert}.weight"] = value
            continue
        if arch == "llama" and stem in {"self_attn.q_proj", "self_attn.k_proj"}:
            value = permuted(value, model.n_heads if "q_proj" in stem else model.n_kv_heads)
        found[f"blk.{layer}.{GGUF_NAMES[stem]}.{kind}"] = value
    return found | {name: np.stack(values) for name, values in experts.items()}


def write_gguf(
    path: Path,
    model: Tiny,
    arch: str = "llama",
    types: tuple[str, ...] = ("F32",),
    extra: dict[str, Any] | None = None,
    stacked: bool = True,
    drop: tuple[str, ...] = (),
    more: dict[str, Array] | None = None,
    split: int = 0,
    alignment: int = 32,
) -> Path:
    """A GGUF file of the model, its matrices in `types` in turn; `extra` fields replace or (None) take away."""
    fields = {
        "block_count": model.n_layers,
        "context_length": 512,
        "embedding_length": model.hidden,
        "feed_forward_length": model.intermediate,
        "attention.head_count": model.n_heads,
        "attention.head_count_kv": model.n_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "rope.freq_base": 10000.0,
    }
    if model.n_experts:
        fields |= {"expert_count": model.n_experts, "expert_used_count": 2}
        fields["expert_feed_forward_length"] = model.moe_intermediate
    fields |= extra or {}
    kwargs = {"split_max_tensors": split} if split else {}
    writer = gguf.GGUFWriter(path, arch, **kwargs)
    for name, value in fields.items():
        full = name if "." in name and name.split(".")[0] in {"tokenizer", "general"} else f"{arch}.{name}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32)(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif value is not None:
            writer.add_array(full, value)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    matrices = 0
    for name, value in (gguf_tensors(model, arch, stacked) | (more or {})).items():
        if name in drop:
            continue
        if value.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, value)
            continue
        kind = gguf.GGMLQuantizationType[types[matrices % len(types)]]
        matrices += 1
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, blocks_of(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def through(kind: str, value: Array) -> Array:
    """What is left of float32 values after they were stored as `kind`."""
    if kind in DTYPES:
        return value.astype(DTYPES[kind]).astype(np.float32)
    stored = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(blocks_of(value, stored), stored)


def blocks_of(value: Array, kind: gguf.GGMLQuantizationType) -> Array:
    """The blocks of a matrix, or of those of experts; to NVFP4 the library quantises none: each row has random ones."""
    if kind is not gguf.GGMLQuantizationType.NVFP4:
        return gguf.quants.quantize(value, kind)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    found = np.empty((*value.shape[:-1], value.shape[-1] // block, nbytes), np.uint8)
    for row, out in zip(
        value.reshape(-1, value.shape[-1]), found.reshape(-1, *found.shape[-2:]), strict=True
    ):
        out[:] = np.random.default_rng(zlib.crc32(row.tobytes())).integers(0, 256, out.shape)
    found[..., :4] &= 0x7F  # scales have no sign
    return found.reshape(*value.shape[:-1], -1)
