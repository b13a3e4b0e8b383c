"""The one table of tensors: what a tensor is called in each kind of file, and how shards cut it.

Planner, loader and packer share it. A tensor is known by a `Key`; `parse_hf` and `parse_gguf` turn the names in files
into keys, `hf_name` and `gguf_name` turn keys into the names that messages speak of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Key(NamedTuple):
    """A tensor of the model; `layer` is -1 for the global ones, `expert` -1 for what experts do not have."""

    role: str
    layer: int = -1
    expert: int = -1


class Cut(Enum):
    """What of a tensor a shard holds; columns are a matrix's inputs, rows its outputs (and a bias's entries)."""

    WHOLE = "whole"
    ROWS_HEADS = "rows:heads"
    ROWS_KV_HEADS = "rows:kv_heads"
    COLS_HEADS = "cols:heads"
    ROWS_FFN = "rows:ffn"
    COLS_FFN = "cols:ffn"
    ROWS_VOCAB = "rows:vocab"


@dataclass(frozen=True)
class Role:
    """One row of the table. `{l}` and `{e}` stand for the layer's and the expert's number.

    `hf` and `gguf` name the tensor of a layer without experts (or a global one), `*_expert` one expert's tensor,
    `*_stacked` all experts' in one, experts outermost. The first name is the usual one. Hugging Face names come without
    the "model." that they begin with in all but base-model checkpoints. `quantisable`: `quantize = ...` applies.
    """

    name: str
    cut: Cut
    ndim: int
    hf: str
    gguf: str
    quantisable: bool = False
    hf_expert: tuple[str, ...] = ()
    hf_stacked: tuple[str, ...] = ()
    gguf_expert: tuple[str, ...] = ()
    gguf_stacked: tuple[str, ...] = ()

    @property
    def cut_by_columns(self) -> bool:
        """Whether shards hold columns of it: its blocks must then be narrow enough."""
        return self.cut in (Cut.COLS_HEADS, Cut.COLS_FFN)


def _vector(name: str, cut: Cut, hf: str, gguf: str) -> Role:
    return Role(name, cut, 1, f"layers.{{l}}.{hf}", f"blk.{{l}}.{gguf}")


def _matrix(name: str, cut: Cut, hf: str, gguf: str) -> Role:
    return Role(name, cut, 2, f"layers.{{l}}.{hf}", f"blk.{{l}}.{gguf}", quantisable=True)


def _ffn(name: str, cut: Cut, mixtral: str) -> Role:
    return Role(
        name,
        cut,
        2,
        f"layers.{{l}}.mlp.{name}_proj.weight",
        f"blk.{{l}}.ffn_{name}.weight",
        quantisable=True,
        hf_expert=(
            f"layers.{{l}}.mlp.experts.{{e}}.{name}_proj.weight",
            f"layers.{{l}}.block_sparse_moe.experts.{{e}}.{mixtral}.weight",
        ),
        hf_stacked=(f"layers.{{l}}.mlp.experts.{name}_proj",),
        gguf_expert=(f"blk.{{l}}.ffn_{name}.{{e}}.weight",),
        gguf_stacked=(f"blk.{{l}}.ffn_{name}_exps.weight",),
    )


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("embed", Cut.WHOLE, 2, "embed_tokens.weight", "token_embd.weight"),
        _vector("attn_norm", Cut.WHOLE, "input_layernorm.weight", "attn_norm.weight"),
        _matrix("q", Cut.ROWS_HEADS, "self_attn.q_proj.weight", "attn_q.weight"),
        _matrix("k", Cut.ROWS_KV_HEADS, "self_attn.k_proj.weight", "attn_k.weight"),
        _matrix("v", Cut.ROWS_KV_HEADS, "self_attn.v_proj.weight", "attn_v.weight"),
        _vector("q_bias", Cut.ROWS_HEADS, "self_attn.q_proj.bias", "attn_q.bias"),
        _vector("k_bias", Cut.ROWS_KV_HEADS, "self_attn.k_proj.bias", "attn_k.bias"),
        _vector("v_bias", Cut.ROWS_KV_HEADS, "self_attn.v_proj.bias", "attn_v.bias"),
        _vector("q_norm", Cut.WHOLE, "self_attn.q_norm.weight", "attn_q_norm.weight"),
        _vector("k_norm", Cut.WHOLE, "self_attn.k_norm.weight", "attn_k_norm.weight"),
        _matrix("o", Cut.COLS_HEADS, "self_attn.o_proj.weight", "attn_output.weight"),
        _vector("o_bias", Cut.WHOLE, "self_attn.o_proj.bias", "attn_output.bias"),
        _vector("ffn_norm", Cut.WHOLE, "post_attention_layernorm.weight", "ffn_norm.weight"),
        Role("router", Cut.WHOLE, 2, "layers.{l}.mlp.gate.weight", "blk.{l}.ffn_gate_inp.weight"),
        _ffn("gate", Cut.ROWS_FFN, "w1"),
        _ffn("up", Cut.ROWS_FFN, "w3"),
        _ffn("down", Cut.COLS_FFN, "w2"),
        _vector("gate_bias", Cut.ROWS_FFN, "mlp.gate_proj.bias", "ffn_gate.bias"),
        _vector("up_bias", Cut.ROWS_FFN, "mlp.up_proj.bias", "ffn_up.bias"),
        _vector("down_bias", Cut.WHOLE, "mlp.down_proj.bias", "ffn_down.bias"),
        Role("final_norm", Cut.WHOLE, 1, "norm.weight", "output_norm.weight"),
        Role("head", Cut.ROWS_VOCAB, 2, "lm_head.weight", "output.weight", quantisable=True),
    )
}

# Other names of the same tensors (Mixtral's router; gate and up in one tensor, as transformers 5 has them in memory).
_HF_MORE = {"layers.{l}.block_sparse_moe.gate.weight": ("router",)}
_HF_FUSED = {"layers.{l}.mlp.experts.gate_up_proj": ("gate", "up")}
_GGUF_FUSED = {"blk.{l}.ffn_gate_up_exps.weight": ("gate", "up")}

# Tensors that carry nothing which the configuration does not say: buffers that old checkpoints saved along.
_HF_IGNORED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_GGUF_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
GGUF_ROPE_FACTORS = "rope_freqs.weight"


class Parsed(NamedTuple):
    """What a name in a file stands for.

    `roles` has two names where two matrices lie in one, row upon row; `stacked` tensors hold all experts, outermost.
    """

    roles: tuple[str, ...]
    layer: int
    expert: int
    stacked: bool


class _Pattern(NamedTuple):
    regex: re.Pattern[str]
    roles: tuple[str, ...]
    stacked: bool


def _pattern(name: str, roles: tuple[str, ...], stacked: bool = False) -> _Pattern:
    number = "(?:0|[1-9][0-9]{0,5})"
    regex = (
        re.escape(name).replace(r"\{l\}", f"(?P<layer>{number})").replace(r"\{e\}", f"(?P<expert>{number})")
    )
    return _Pattern(re.compile(regex), roles, stacked)


_HF = (
    *(_pattern(name, (role.name,)) for role in ROLES.values() for name in (role.hf, *role.hf_expert)),
    *(_pattern(name, roles) for name, roles in _HF_MORE.items()),
    *(_pattern(name, (role.name,), True) for role in ROLES.values() for name in role.hf_stacked),
    *(_pattern(name, roles, True) for name, roles in _HF_FUSED.items()),
)
_GGUF = (
    *(_pattern(name, (role.name,)) for role in ROLES.values() for name in (role.gguf, *role.gguf_expert)),
    *(_pattern(name, (role.name,), True) for role in ROLES.values() for name in role.gguf_stacked),
    *(_pattern(name, roles, True) for name, roles in _GGUF_FUSED.items()),
)


def parse_hf(name: str) -> Parsed | None:
    """What a tensor of a safetensors file is; None if its name is not in the table."""
    return _parse(name.removeprefix("model."), _HF)


def parse_gguf(name: str) -> Parsed | None:
    """What a tensor of a GGUF file is; None if its name is not in the table."""
    return _parse(name, _GGUF)


def ignored_hf(name: str) -> bool:
    """Whether a tensor of a safetensors file can be left unread."""
    return _HF_IGNORED.fullmatch(name) is not None


def ignored_gguf(name: str) -> bool:
    """Whether a tensor of a GGUF file is not a weight (rope factors are read with the configuration)."""
    return _GGUF_IGNORED.fullmatch(name) is not None


def _parse(name: str, patterns: Iterable[_Pattern]) -> Parsed | None:
    for pattern in patterns:
        match = pattern.regex.fullmatch(name)
        if match:
            numbers = match.groupdict()
            layer, expert = int(numbers.get("layer", -1)), int(numbers.get("expert", -1))
            return Parsed(pattern.roles, layer, expert, pattern.stacked)
    return None


def hf_name(key: Key) -> str:
    """The usual name of a tensor in a Hugging Face checkpoint."""
    role = ROLES[key.role]
    name = role.hf if key.expert < 0 else role.hf_expert[0]
    return ("" if key.role == "head" else "model.") + name.format(l=key.layer, e=key.expert)


def hf_name_of_experts(key: Key) -> str:
    """The same for all experts of a layer, with a star for the expert's number."""
    return hf_name(key._replace(expert=0)).replace(".experts.0.", ".experts.*.")


def gguf_name(key: Key) -> str:
    """The usual name of a tensor in a GGUF file; experts lie in one tensor there."""
    role = ROLES[key.role]
    name = role.gguf if key.expert < 0 else role.gguf_stacked[0]
    return name.format(l=key.layer)
