"""Experts as DeepSeek V3 has them, which several families took over."""

from __future__ import annotations

from mpillm.model.families.base import read_chosen, read_width
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec


def read_routed_experts(fields: Fields, shared: int = 1) -> ExpertsSpec:
    """Experts that a sigmoid with a correction chooses, perhaps in groups, beside `shared` ones by default."""
    local = fields.optional_integer("num_local_experts", 1, 2**16)
    count = local or fields.integer("n_routed_experts", 1, 2**16)
    fields.read.add("n_routed_experts")
    width = read_width(fields, "moe_intermediate_size")
    groups = fields.integer("n_group", 1, 2**16, default=1)
    if count % groups:
        raise fields.fail("n_group", f"but {count} experts are no such number of equal groups")
    router = RouterSpec(
        read_chosen(fields, count),
        scoring="sigmoid",
        correction=True,
        groups=groups,
        groups_chosen=fields.integer("topk_group", 1, groups, default=1),
        normalise=fields.flag("norm_topk_prob"),
        scale=fields.number("routed_scaling_factor", 0, 1e9, default=1.0),
    )
    shared = fields.integer("n_shared_experts", 0, 2**16, default=shared)
    return ExpertsSpec(
        count, width, router, shared=MlpSpec(width * shared, prefix="shared_") if shared else None
    )
