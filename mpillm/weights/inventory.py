"""Which tensors a model has, with their whole shapes, by the parts in which they are paged in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from mpillm.partition.grid import Shape
from mpillm.weights.names import Key

Tensors = list[tuple[Key, tuple[int, ...]]]  # with their whole shapes

# What is paged in together, in the order in which a step uses it: the smaller the parts, the less memory is bound by
# what is in use and what is on its way, and the more can stay.
ATTENTION, GATE, UP, DOWN, EXPERT, HEAD = "attention", "gate", "up", "down", "expert", "the output head"
_PART_OF = {"gate_bias": GATE, "up_bias": UP, "down_bias": DOWN, GATE: GATE, UP: UP, DOWN: DOWN}


class Flags(Protocol):
    """What of a model's configuration decides which tensors it has; `ModelConfig` is one."""

    @property
    def attention_bias(self) -> bool: ...
    @property
    def o_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def moe_layers(self) -> Sequence[bool]: ...


def all_tensors(shape: Shape, flags: Flags) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """Every tensor of a model, and its whole shape."""
    yield Key("embed"), (shape.vocab, shape.hidden)
    yield from head_tensors(shape)
    for layer in range(shape.n_layers):
        yield from layer_tensors(shape, flags, layer)


def layer_tensors(shape: Shape, flags: Flags, layer: int) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """The tensors of a layer and their whole shapes."""
    d, hd = shape.hidden, shape.head_dim
    heads, kv_heads = shape.n_heads * hd, shape.n_kv_heads * hd

    def own(role: str, *dims: int) -> tuple[Key, tuple[int, ...]]:
        return Key(role, layer), dims

    yield own("attn_norm", d)
    yield own("q", heads, d)
    yield own("k", kv_heads, d)
    yield own("v", kv_heads, d)
    if flags.attention_bias:
        yield own("q_bias", heads)
        yield own("k_bias", kv_heads)
        yield own("v_bias", kv_heads)
    if flags.qk_norm:
        yield own("q_norm", hd)
        yield own("k_norm", hd)
    yield own("o", d, heads)
    if flags.o_bias:
        yield own("o_bias", d)
    yield own("ffn_norm", d)
    if flags.moe_layers[layer]:
        yield own("router", shape.n_experts, d)
        for expert in range(shape.n_experts):
            yield from expert_tensors(shape, layer, expert)
        return
    width = shape.intermediate
    yield own("gate", width, d)
    yield own("up", width, d)
    yield own("down", d, width)
    if flags.mlp_bias:
        yield own("gate_bias", width)
        yield own("up_bias", width)
        yield own("down_bias", d)


def expert_tensors(shape: Shape, layer: int, expert: int) -> Tensors:
    """The tensors of an expert and their whole shapes."""
    d, width = shape.hidden, shape.moe_intermediate
    dims = {"gate": (width, d), "up": (width, d), "down": (d, width)}
    return [(Key(role, layer, expert), size) for role, size in dims.items()]


def head_tensors(shape: Shape) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """The tensors of the output head and their whole shapes."""
    yield Key("final_norm"), (shape.hidden,)
    yield Key("head"), (shape.vocab, shape.hidden)


def layer_parts(shape: Shape, flags: Flags, layer: int) -> dict[str, Tensors]:
    """The tensors of a layer by the part in which they are paged in, in the order of use; without experts.

    `ATTENTION` has what comes before the feed-forward products too: their norm, and the router.
    """
    parts: dict[str, Tensors] = {}
    for key, dims in layer_tensors(shape, flags, layer):
        if key.expert < 0:
            parts.setdefault(_PART_OF.get(key.role, ATTENTION), []).append((key, dims))
    return parts


def described(key: Key) -> str:
    of = "" if key.layer < 0 else f" of layer {key.layer}"
    return f"{key.role}{of}" + ("" if key.expert < 0 else f", expert {key.expert}")
