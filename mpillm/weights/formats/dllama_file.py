"""Distributed-Llama's model files (`.m`) as sources.

A file has a magic number, the size of its header, pairs of a key and a value (int32), and then all tensors, one behind
the other, without names or gaps. Keys and the order of tensors are those of its src/llm.cpp and
converter/convert-hf.py. Its block types q40 and q80 are ggml's Q4_0 and Q8_0, byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Extent
from mpillm.weights.formats.families import Families
from mpillm.weights.formats.stored import OWN, Stored
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.roles import Key, hf_name

MAGIC = 0xA00ABCD
OLD_MAGICS = (0xABCD00, 0xABCD01)  # magic numbers of the first versions, whose headers have no keys
KEYS = (
    "version", "arch_type", "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "n_experts", "n_active_experts",
    "vocab_size", "max_seq_len", "hidden_act", "rope_theta", "weights_float_type", "rope_scaling_factor",
    "rope_scaling_low_freq_factor", "rope_scaling_high_freq_factor", "rope_scaling_orig_max_seq_len", "rope_type",
    "head_dim", "norm_epsilon", "moe_hidden_dim",
)  # fmt: skip
LLAMA, QWEN3, QWEN3_MOE = 0xABCD00, 0xABCD01, 0xABCD02  # arch_type
ARCHITECTURES = {
    LLAMA: ("LlamaForCausalLM", "llama"),
    QWEN3: ("Qwen3ForCausalLM", "qwen3"),
    QWEN3_MOE: ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
FLOAT_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q8_0"}  # weights_float_type
EPSILONS = {5: 1e-5, 6: 1e-6}  # norm_epsilon
SILU = 1  # hidden_act
MOST_EXPERTS = 65_536
PAIRS, HALVES, LLAMA3 = 0, 1, 2  # rope_type: what RoPE turns together, and Llama 3's scaling of pairs


class _Tensor(NamedTuple):
    """A tensor in the file's order; `heads` > 0: see `Extent.rope_heads`."""

    key: Key
    shape: tuple[int, ...]
    stored: Stored
    heads: int = 0

    @property
    def nbytes(self) -> int:
        rows = self.shape[0] if len(self.shape) == 2 else 1
        return rows * self.stored.row_bytes(self.shape[-1])


def is_dllama(path: Path) -> bool:
    """Return whether a path is a file of this kind, by its name or how it begins."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".m" or file.read(4) == struct.pack("<i", MAGIC)
    except OSError:  # opening it says more
        return path.suffix == ".m"


def open_dllama(path: Path, families: Families, quantize: str) -> TensorSource:
    """Return the model in a file, with the tokenizer beside it; ModelError if it is not complete or not sound."""
    file = MappedFile(path)
    try:
        header = _Header(file)
        config = header.config()
        families.of_config(config, str(path))
        first, layer, last = header.tensors()
        at = header.nbytes
        size = at + sum(tensor.nbytes for tensor in (*first, *last))
        size += header.whole("n_layers") * sum(tensor.nbytes for tensor in layer)
        if size != file.size:
            raise ModelError(
                f"{path} has {file.size} bytes, but its header describes {size}; fetch or convert it again."
            )
        extents: dict[Key, Extent] = {}
        layers = (
            tensor._replace(key=tensor.key._replace(layer=number))
            for number in range(header.whole("n_layers"))
            for tensor in layer
        )
        for key, shape, stored, heads in (*first, *layers, *last):
            extents[key] = Extent(file, hf_name(key), at, shape, stored, heads)
            at += extents[key].nbytes
        return TensorSource(path, [file], (), extents, config, tokenizer_beside(path) or {}, quantize)
    except BaseException:
        file.close()
        raise


def tokenizer_beside(path: Path) -> Path | None:
    """Return the tokenizer (`.t`) of a model: its directory's only one, or the one with its name; None if none.

    ModelError if there are several of other names.
    """
    found = sorted(path.parent.glob("*.t"))
    named = (f"{path.stem}.t", f"{path.stem.replace('model', 'tokenizer')}.t")
    chosen = [file for file in found if file.name in named] or found
    if len(chosen) > 1:
        raise ModelError(
            f"{path.parent} holds {len(found)} tokenizers (.t); name the one of {path.name} {named[1]}."
        )
    return chosen[0] if chosen else None


class _Header:
    """The keys of a file with their values; a ModelError says which one is not as it must be."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        magic, self.nbytes = struct.unpack("<ii", file.view(0, 8).tobytes()) if file.size >= 8 else (0, 0)
        if magic in OLD_MAGICS:
            raise ModelError(
                f"{file.path} is in Distributed-Llama's old format, without keys; convert the model again with its "
                "newest version."
            )
        if magic != MAGIC:
            raise ModelError(f"{file.path} is not a model file of Distributed-Llama.")
        if not 8 <= self.nbytes <= file.size or self.nbytes % 8:
            raise ModelError(f"{file.path} says that its header has {self.nbytes} bytes; fetch it again.")
        self.values: dict[str, int] = {}
        pairs = struct.iter_unpack("<ii", file.view(8, self.nbytes - 8).tobytes())
        for key, value in pairs:
            if not 0 <= key < len(KEYS):
                raise ModelError(
                    f"{file.path} has the header key {key}, which is unknown and may change the result."
                )
            if KEYS[key] in self.values:
                raise ModelError(f"{file.path} has the header key {KEYS[key]} twice; fetch it again.")
            self.values[KEYS[key]] = value

    def whole(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """Return a value of at least `minimum`."""
        value = self.values.get(name, default)
        if value is None:
            raise ModelError(f"{self.path}: its header has no {name}.")
        if value < minimum:
            raise self._wrong(name, f"must be at least {minimum}")
        return value

    def of(self, name: str, known: dict[int, Any], default: int | None = None) -> Any:
        """Return the meaning of a value."""
        value = self.whole(name, default, minimum=-(2**31))
        if value not in known:
            raise self._wrong(name, f"must be one of {', '.join(map(str, known))}")
        return known[value]

    def _wrong(self, name: str, must: str) -> ModelError:
        return ModelError(f"{self.path}: {name} is {self.values[name]} in its header, but {must}.")

    @property
    def experts(self) -> int:
        """Experts of each layer; 0 if it has none."""
        count = self.whole("n_experts", 0, minimum=0)
        if count > MOST_EXPERTS:
            raise self._wrong("n_experts", f"must be at most {MOST_EXPERTS}")
        if (self.values.get("arch_type") == QWEN3_MOE) != (count > 0):
            raise self._wrong("arch_type", f"that does not go with {count} experts")
        return count

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads of queries, heads of keys, and the width of a head."""
        heads, dim = self.whole("n_heads"), self.whole("dim")
        return heads, self.whole("n_kv_heads"), self.whole("head_dim", 0, minimum=0) or dim // heads

    @property
    def rope(self) -> int:
        """rope_type; Qwen's is always that of halves, whatever the header says."""
        found: int = self.of("rope_type", {kind: kind for kind in (PAIRS, HALVES, LLAMA3)}, PAIRS)
        return found if self.values["arch_type"] == LLAMA else HALVES

    def config(self) -> dict[str, Any]:
        """Return the configuration with Hugging Face's keys."""
        self.of("version", {0: 0}, 0)
        self.of("hidden_act", {SILU: "silu"}, SILU)
        architecture, model_type = self.of("arch_type", ARCHITECTURES)
        heads, kv_heads, head_dim = self.heads
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_size": self.whole("dim"),
            "intermediate_size": self.whole("hidden_dim"),
            "num_hidden_layers": self.whole("n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": self.whole("vocab_size"),
            "max_position_embeddings": self.whole("max_seq_len"),
            "rms_norm_eps": self.of("norm_epsilon", EPSILONS, 5),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "rope_parameters": self._rope(),
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.experts:
            config |= {
                "num_experts": self.experts,
                "num_experts_per_tok": self.whole("n_active_experts"),
                "moe_intermediate_size": self.whole("moe_hidden_dim"),
                "norm_topk_prob": True,
                "mlp_only_layers": [],
            }
        return config

    def _rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": float(self.whole("rope_theta", 10000)), "rope_type": "default"}
        factor = self.whole("rope_scaling_factor", 1)
        if factor == 1 or self.rope == HALVES:  # the frequencies of HALVES are never scaled
            return rope
        return rope | {
            "rope_type": "llama3",
            "factor": float(factor),
            "low_freq_factor": float(self.whole("rope_scaling_low_freq_factor")),
            "high_freq_factor": float(self.whole("rope_scaling_high_freq_factor")),
            "original_max_position_embeddings": self.whole("rope_scaling_orig_max_seq_len"),
        }

    def tensors(self) -> tuple[list[_Tensor], list[_Tensor], list[_Tensor]]:
        """Return the tensors before the layers, of a layer, and behind them."""
        hidden, vocab = self.whole("dim"), self.whole("vocab_size")
        stored = OWN[self.of("weights_float_type", FLOAT_TYPES)]
        first = [_Tensor(Key("embed"), (vocab, hidden), OWN["F32"])]
        last = [
            _Tensor(Key("final_norm"), (hidden,), OWN["F32"]),
            _Tensor(Key("head"), (vocab, hidden), stored),
        ]
        layer = list(self._layer(stored))
        for tensor in (*layer, *last):
            if tensor.shape[-1] % tensor.stored.block:
                raise ModelError(
                    f"{self.path}: {tensor.key.role} has rows of {tensor.shape[-1]} values, not whole blocks of "
                    f"{stored.block}; its header is damaged."
                )
        return first, layer, last

    def _layer(self, stored: Stored) -> Iterator[_Tensor]:
        hidden = self.whole("dim")
        heads, kv_heads, head_dim = self.heads
        pairs = self.rope != HALVES
        yield _Tensor(Key("q"), (heads * head_dim, hidden), stored, heads if pairs else 0)
        yield _Tensor(Key("k"), (kv_heads * head_dim, hidden), stored, kv_heads if pairs else 0)
        yield _Tensor(Key("v"), (kv_heads * head_dim, hidden), stored)
        yield _Tensor(Key("o"), (hidden, heads * head_dim), stored)
        if self.experts:
            yield _Tensor(Key("router"), (self.experts, hidden), OWN["F32"])
        width = self.whole("moe_hidden_dim" if self.experts else "hidden_dim")
        for expert in range(self.experts) if self.experts else (-1,):
            yield _Tensor(Key("gate", expert=expert), (width, hidden), stored)
            yield _Tensor(Key("down", expert=expert), (hidden, width), stored)
            yield _Tensor(Key("up", expert=expert), (width, hidden), stored)
        if self.values["arch_type"] != LLAMA:
            yield _Tensor(Key("q_norm"), (head_dim,), OWN["F32"])
            yield _Tensor(Key("k_norm"), (head_dim,), OWN["F32"])
        yield _Tensor(Key("attn_norm"), (hidden,), OWN["F32"])
        yield _Tensor(Key("ffn_norm"), (hidden,), OWN["F32"])
