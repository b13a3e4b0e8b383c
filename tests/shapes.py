"""Models that are nothing but their sizes, for tests of how they are cut."""

from __future__ import annotations

from mpillm.model.config import ModelConfig
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.partition.grid import Axis

NORM = NormSpec(1e-6)


def shape(
    n_layers: int,
    hidden: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    n_experts: int = 0,
    moe_intermediate: int = 0,
    unit: int = 32,
    moe_layers: tuple[bool, ...] | None = None,
    chosen: int = 1,
    **attention: object,
) -> ModelConfig:
    """A model of these sizes; with experts, its first layer is dense if `intermediate` is not 0, or as told."""
    mixer = AttentionSpec(n_heads, n_kv_heads, head_dim, head_dim**-0.5, None, **attention)  # type: ignore[arg-type]
    if moe_layers is None:
        moe_layers = tuple(n_experts > 0 and (layer > 0 or not intermediate) for layer in range(n_layers))
    mlps: list[MlpSpec | ExpertsSpec] = [
        ExpertsSpec(n_experts, moe_intermediate, RouterSpec(chosen)) if experts else MlpSpec(intermediate)
        for experts in moe_layers
    ]
    layers = tuple(LayerSpec(mixer, mlp, Norms(NORM), Norms(NORM)) for mlp in mlps)
    return ModelConfig("Tiny", hidden, vocab, layers, NORM, 512, block=unit)


def heads(model: ModelConfig) -> Axis:
    """The axis of query heads."""
    return model.layers[0].mixer.heads(model.block)


def kv_heads(model: ModelConfig) -> Axis:
    """The axis of KV heads."""
    mixer = model.layers[0].mixer
    return heads(model).shared(mixer.n_heads // mixer.n_kv_heads)


def columns(model: ModelConfig, width: int) -> Axis:
    """The axis of an MLP's inner columns."""
    return MlpSpec(width).columns(model.block)


def widths(model: ModelConfig) -> set[int]:
    """The widths of the MLPs that a layer can have: dense, and one expert's."""
    return {layer.mlp.width for layer in model.layers}
