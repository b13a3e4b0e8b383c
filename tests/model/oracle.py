"""A decoder of all architectures in plain NumPy, float64: the independent twin of the real one in tests.

It shares no code with the package, not even the reading of configurations, and knows only whole sequences: no cache,
no batch, no shards. Expects what transformers writes: safetensors files and a config.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK = 32  # values that share a scale in Q8_0 and Q4_0
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Oracle:
    """A model directory, ready to score token ids.

    With `quantize` ("q8_0", "q4_0") matrices are quantised, and what is multiplied with them is quantised to Q8_0. What
    is multiplied with BF16 is rounded to BF16, unless all is to be `exact`.
    """

    def __init__(self, folder: Path, quantize: str | None = None, exact: bool = False) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, Array] = {}
        self.dtypes: dict[str, str] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for tensor, (dtype, values) in read_safetensors(path).items():
                self.weights[tensor], self.dtypes[tensor] = values, dtype
        self.quantize = quantize
        self.exact = exact
        self._quantized: dict[str, Array] = {}
        config = self.config
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads

    def logprobs(self, ids: list[int]) -> Array:
        """[len(ids), vocabulary]: row i is the distribution of the token that follows ids[: i + 1]."""
        tied = self.config.get("tie_word_embeddings", False)
        logits = self._linear(self.hidden(ids), "model.embed_tokens" if tied else "lm_head")
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest continuation of `count` tokens."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logprobs(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def hidden(self, ids: list[int]) -> Array:
        """[len(ids), hidden]: activations after the final norm."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{i}"
            x = x + self._attention(self._norm(x, f"{name}.input_layernorm"), i)
            x = x + self._feed_forward(self._norm(x, f"{name}.post_attention_layernorm"), name)
        return self._norm(x, "model.norm")

    def _norm(self, x: Array, name: str) -> Array:
        eps = self.config["rms_norm_eps"]
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self.weights[f"{name}.weight"]

    def _linear(self, x: Array, name: str) -> Array:
        weight = self.weights[f"{name}.weight"]
        if self.quantize:
            if name not in self._quantized:
                self._quantized[name] = through_blocks(weight, self.quantize)
            weight, x = self._quantized[name], through_activation_blocks(x)
        elif self.dtypes[f"{name}.weight"] == "BF16" and not self.exact:
            x = rounded(x)
        return x @ weight.T + self.weights.get(f"{name}.bias", 0.0)

    def _attention(self, x: Array, layer: int) -> Array:
        name, m, hd = f"model.layers.{layer}.self_attn", len(x), self.head_dim
        q = self._linear(x, f"{name}.q_proj").reshape(m, self.heads, hd)
        k = self._linear(x, f"{name}.k_proj").reshape(m, self.kv_heads, hd)
        v = self._linear(x, f"{name}.v_proj").reshape(m, self.kv_heads, hd)
        if f"{name}.q_norm.weight" in self.weights:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        cos, sin = rope_angles(self.config, hd, m)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        distance = np.arange(m)[:, None] - np.arange(m)[None, :]
        window = self._window(layer)
        seen = (distance >= 0) & (distance < window if window else True)
        out = np.empty((m, self.heads, hd))
        for head in range(self.heads):
            kv = head * self.kv_heads // self.heads
            scores = np.where(seen, q[:, head] @ k[:, kv].T / math.sqrt(hd), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv]
        return self._linear(out.reshape(m, -1), f"{name}.o_proj")

    def _window(self, layer: int) -> int:
        config = self.config
        if config["model_type"] in ("mistral", "mixtral"):
            return config["sliding_window"] or 0
        if not config.get("use_sliding_window"):
            return 0
        if "layer_types" in config:
            return config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else 0
        return config["sliding_window"] if layer >= config["max_window_layers"] else 0

    def _feed_forward(self, x: Array, layer: str) -> Array:
        if f"{layer}.block_sparse_moe.gate.weight" in self.weights:
            return self._experts(x, f"{layer}.block_sparse_moe", ("w1", "w3", "w2"), normalised=True)
        if f"{layer}.mlp.gate.weight" in self.weights:
            names = ("gate_proj", "up_proj", "down_proj")
            return self._experts(x, f"{layer}.mlp", names, self.config["norm_topk_prob"])
        return self._gated(x, f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj"))

    def _gated(self, x: Array, name: str, parts: tuple[str, str, str]) -> Array:
        gate, up, down = (f"{name}.{part}" for part in parts)
        g = self._linear(x, gate)
        return self._linear(g / (1 + np.exp(-g)) * self._linear(x, up), down)

    def _experts(self, x: Array, name: str, parts: tuple[str, str, str], normalised: bool) -> Array:
        scores = np.exp(x @ self.weights[f"{name}.gate.weight"].T)
        scores /= scores.sum(axis=1, keepdims=True)
        out = np.zeros_like(x)
        for i, row in enumerate(scores):
            chosen = np.argsort(-row, kind="stable")[: self.config["num_experts_per_tok"]]
            total = row[chosen].sum() if normalised else 1.0
            for expert in chosen:
                out[i] += (
                    row[expert] / total * self._gated(x[i : i + 1], f"{name}.experts.{expert}", parts)[0]
                )
        return out


def read_safetensors(path: Path) -> dict[str, tuple[str, Array]]:
    """All tensors of a file: their types, and values as float64."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, info in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in info["data_offsets"])
            values = np.frombuffer(data[first:last], DTYPES[info["dtype"]]).astype(np.float64)
            tensors[name] = info["dtype"], values.reshape(info["shape"])
    return tensors


def rounded(x: Array) -> Array:
    """The nearest BF16."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def through_blocks(x: Array, kind: str) -> Array:
    """Rows quantised in blocks (the last one padded with zeros) and dequantised, by the gguf library."""
    block_type = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}[kind]
    k = x.shape[-1]
    padded = np.pad(x.astype(np.float32), ((0, 0), (0, -k % BLOCK)))
    back = gguf.quants.dequantize(gguf.quants.quantize(padded, block_type), block_type)
    return back[:, :k].astype(np.float64)


def through_activation_blocks(x: Array) -> Array:
    """Rows quantised as activations are: blocks of 32 signed bytes with a float32 scale."""
    k = x.shape[-1]
    blocks = np.pad(x.astype(np.float32), ((0, 0), (0, -k % BLOCK))).reshape(len(x), -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    back = np.round(blocks / np.where(scale == 0, 1, scale)) * scale
    return back.reshape(len(x), -1)[:, :k].astype(np.float64)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs (i, i + d/2) of x [m, heads, d] by the angles whose cosines and sines are [m, d/2]."""
    a, b = np.split(x, 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def rope_angles(config: dict[str, Any], head_dim: int, count: int) -> tuple[Array, Array]:
    """Cosines and sines of positions 0 .. count - 1: two [count, head_dim / 2], attention factor included."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scale = 1.0
    if kind == "linear":
        frequency = frequency / rope["factor"]
    elif kind == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)  # within the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    elif kind == "yarn":
        turns = rope["original_max_position_embeddings"] / (2 * np.pi)

        def dimension(rotations: float) -> float:
            return head_dim * math.log(turns / rotations) / (2 * math.log(theta))

        low = max(math.floor(dimension(rope.get("beta_fast") or 32)), 0)
        high = min(math.ceil(dimension(rope.get("beta_slow") or 1)), head_dim - 1)
        keep = 1 - np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
        scale = 0.1 * math.log(rope["factor"]) + 1
    else:
        assert kind == "default", kind
    angles = np.arange(count)[:, None] * frequency
    return scale * np.cos(angles), scale * np.sin(angles)
