"""Finds out which tensor a name in a file stands for.

The table `ROLES` has the usual names; a family of models gives those in which it differs as `Names`.
`Names.parse_hf` and `Names.parse_gguf` turn the names in files into keys.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mpillm.weights.roles import ROLES

Roles = tuple[str, ...]  # several where a tensor holds several matrices, row upon row
# Of such roles how many rows each has in one of the equal groups that the tensor's rows are made of.
RowGroups = Mapping[Roles, tuple[int, ...]]

# What Gemma, OLMo and EXAONE call the norms after attention and MLP; elsewhere the first name is that of one before.
AFTER_NORMS: dict[str, Roles] = {
    "layers.{l}.post_attention_layernorm.weight": ("attn_post_norm",),
    "layers.{l}.post_feedforward_layernorm.weight": ("ffn_post_norm",),
}


def with_bias(names: Mapping[str, Roles]) -> dict[str, Roles]:
    """Return names without their last part, each as that of a weight and of a bias."""
    return {
        f"{name}.{part}": tuple(f"{role}{end}" for role in roles)
        for name, roles in names.items()
        for part, end in (("weight", ""), ("bias", "_bias"))
    }


# Other names of the same tensors (Mixtral's router; gate and up in one tensor, as transformers 5 has them in memory).
_HF_MORE: dict[str, Roles] = {"layers.{l}.block_sparse_moe.gate.weight": ("router",)}
_HF_FUSED: dict[str, Roles] = {"layers.{l}.mlp.experts.gate_up_proj": ("gate", "up")}
_GGUF_FUSED: dict[str, Roles] = {"blk.{l}.ffn_gate_up_exps.weight": ("gate", "up")}
# llama.cpp's converter puts q, k and v of any model in one tensor if asked.
_GGUF_QKV: dict[str, Roles] = {
    "blk.{l}.attn_qkv.weight": ("q", "k", "v"),
    "blk.{l}.attn_qkv.bias": ("q_bias", "k_bias", "v_bias"),
}

# Tensors that no text is generated with: buffers that old checkpoints saved along, layers that predict further tokens,
# and what sees images or hears sounds.
_HF_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|(model\.)?mtp\w*\..+|"
    r"(model\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|embed_vision|embed_audio|"
    r"vision_embedder)\..+|"
    r"(model\.)?image_newline|"
    # Masks, the head of a critic, what a cache or attention in FP8 is scaled by.
    r"(.*\.)?(position_ids|masked_bias)|v_head\..+|"
    r"(.*\.)?(self_attn|mixer)\.(\w+\.)?([kqv]|kv|prob)_(scale|zero_point)"
)
GGUF_ROPE_FACTORS = "rope_freqs.weight"
GGUF_LONGROPE_FACTORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}
_ROPE_FACTORS = GGUF_ROPE_FACTORS, *GGUF_LONGROPE_FACTORS.values()
_GGUF_IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


class Parsed(NamedTuple):
    """The meaning of a name in a file.

    `roles` has two names where two matrices lie in one, row upon row, or `in_turn` one row of each; `stacked` tensors
    hold all experts, outermost. Matrices of floats in `transposed` tensors are [columns, rows].
    """

    roles: Roles
    layer: int
    expert: int
    stacked: bool
    in_turn: bool = False
    transposed: bool = False


class _Meaning(NamedTuple):
    roles: Roles
    stacked: bool = False
    in_turn: bool = False
    transposed: bool = False


# By name, with {l} for the number of the layer and {e} for that of the expert.
_Meanings = Mapping[str, _Meaning]
_NUMBER = re.compile("0|[1-9][0-9]{0,5}")
_PLACES = "{l}", "{e}"  # the places of the first and of the second number in a name


def _first(*pairs: tuple[str, _Meaning]) -> dict[str, _Meaning]:
    """Return the meanings of names; of two meanings of a name the first one counts."""
    return dict(reversed(pairs))


_USUAL_HF = _first(
    *((name, _Meaning((role.name,))) for role in ROLES.values() for name in (role.hf, *role.hf_expert)),
    *((name, _Meaning(roles)) for name, roles in _HF_MORE.items()),
    *((name, _Meaning((role.name,), True)) for role in ROLES.values() for name in role.hf_stacked),
    *((name, _Meaning(roles, True)) for name, roles in _HF_FUSED.items()),
)
_USUAL_GGUF = _first(
    *((name, _Meaning((role.name,))) for role in ROLES.values() for name in (role.gguf, *role.gguf_expert)),
    *((name, _Meaning(roles)) for name, roles in _GGUF_QKV.items()),
    *((name, _Meaning((role.name,), True)) for role in ROLES.values() for name in role.gguf_stacked),
    *((name, _Meaning(roles, True)) for name, roles in _GGUF_FUSED.items()),
)


@dataclass(frozen=True)
class Names:
    """The names of a family's tensors where they differ from the usual ones: roles by pattern.

    Hugging Face names are without "model."; those in `hf_stacked` hold all experts of a layer. So do those in
    `hf_in_turn`, where rows of several roles alternate, and GGUF names in `gguf_stacked`. Matrices of floats in
    `hf_in_turn`, and in those of `hf` and `hf_stacked` that `hf_transposed` names, lie transposed. A name with no roles
    is that of a tensor which is not read. `hf_prefixes` are what stands before the names of layers; the first one that
    fits is removed. `rope_pairs`: in GGUF files the rows of q and k lie so that the halves of each head are interleaved
    (llama.cpp's `permute`).
    """

    hf: Mapping[str, Roles] = field(default_factory=dict)
    hf_stacked: Mapping[str, Roles] = field(default_factory=dict)
    gguf: Mapping[str, Roles] = field(default_factory=dict)
    hf_in_turn: Mapping[str, Roles] = field(default_factory=dict)
    hf_transposed: frozenset[str] = frozenset()
    gguf_stacked: Mapping[str, Roles] = field(default_factory=dict)
    hf_prefixes: tuple[str, ...] = (
        "model.language_model.",
        "language_model.model.",
        "language_model.",
        "model.",
    )
    rope_pairs: bool = False

    def parse_hf(self, name: str) -> Parsed | None:
        """Return the key of a tensor of a safetensors file; None if the name is unknown."""
        prefix = next((prefix for prefix in self.hf_prefixes if name.startswith(prefix)), "")
        return _parse(name.removeprefix(prefix), self._own[0], _USUAL_HF)

    def parse_gguf(self, name: str) -> Parsed | None:
        """Return the key of a tensor of a GGUF file; None if the name is unknown."""
        return _parse(name, self._own[1], _USUAL_GGUF)

    @functools.cached_property
    def _own(self) -> tuple[_Meanings, _Meanings]:
        hf, stacked, gguf = (
            [
                (name, _Meaning(roles, names is self.hf_stacked, transposed=name in self.hf_transposed))
                for name, roles in names.items()
            ]
            for names in (self.hf, self.hf_stacked, self.gguf)
        )
        in_turn = [(name, _Meaning(roles, True, True, True)) for name, roles in self.hf_in_turn.items()]
        all_experts = [(name, _Meaning(roles, True)) for name, roles in self.gguf_stacked.items()]
        return _first(*in_turn, *hf, *stacked), _first(*all_experts, *gguf)


USUAL = Names()


def ignored_hf(name: str) -> bool:
    """Return whether a tensor of a safetensors file can be left unread."""
    return _HF_IGNORED.fullmatch(name) is not None


def ignored_gguf(name: str) -> bool:
    """Return whether a tensor of a GGUF file is not a weight (rope factors are read with the configuration)."""
    return name in _ROPE_FACTORS or _GGUF_IGNORED.fullmatch(name) is not None


def holds_rope_factors(name: str) -> bool:
    """Return whether a tensor of a GGUF file has divisors of rotary frequencies."""
    return name in _ROPE_FACTORS


def _parse(name: str, *tables: _Meanings) -> Parsed | None:
    if "{" in name:
        return None
    words, numbers = name.split("."), list[int]()
    for at, word in enumerate(words):
        if len(numbers) < len(_PLACES) and _NUMBER.fullmatch(word):
            words[at] = _PLACES[len(numbers)]
            numbers.append(int(word))
    pattern = ".".join(words)
    for table in tables:
        if (meaning := table.get(pattern)) is not None:
            layer, expert = (*numbers, -1, -1)[:2]
            return Parsed(meaning.roles, layer, expert, meaning.stacked, meaning.in_turn, meaning.transposed)
    return None
