"""Experts as DeepSeek V3 has them, which several families took over."""

from __future__ import annotations

from typing import Any

from mpillm.kernels.types import Activation
from mpillm.model.families.base import read_chosen, read_width
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec

# Keys that mean nothing where no layer has experts.
OF_EXPERTS = {
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "scoring_func",
    "topk_group",
    "topk_method",
}


def read_routed_experts(
    fields: Fields,
    activation: Activation,
    shared: int = 1,
    shared_key: str = "n_shared_experts",
    scale_key: str = "routed_scaling_factor",
    **router: Any,
) -> ExpertsSpec:
    """Experts that a sigmoid with a correction chooses, perhaps in groups, beside `shared` ones by default.

    The keys are what the family calls the number of shared ones and the factor of weights, `router` is what else it
    says of the choice.
    """
    # Files of transformers have one name or the other.
    names = (
        "n_routed_experts",
        "num_local_experts",
        "num_experts",
    )
    given = [name for name in names if fields.values.get(name) is not None] or [names[0]]
    counts = [fields.integer(name, 1, 2**16) for name in given]
    count = counts[0]
    if counts.count(count) != len(counts):
        raise fields.fail(given[0], f"but {given[1]} is {fields.values[given[1]]}")
    fields.read |= set(names)
    groups = fields.integer("n_group", 1, 2**16, default=1)
    if count % groups:
        raise fields.fail("n_group", f"but {count} experts cannot be divided into that many equal groups")
    used = fields.integer("topk_group", 1, groups, default=1)
    chosen = read_chosen(fields, count)
    if chosen > used * (count // groups):
        raise fields.fail("num_experts_per_tok", f"but {used} groups have {used * (count // groups)} experts")
    spec = RouterSpec(
        chosen,
        groups=groups,
        groups_chosen=used,
        scale=fields.number(scale_key, 0, 1e9, default=1.0),
        **{
            "scoring": "sigmoid",
            "correction": True,
            **({} if "normalise" in router else {"normalise": fields.flag("norm_topk_prob")}),
            **router,
        },
    )
    width = read_width(fields, "moe_intermediate_size")
    shared = fields.integer(shared_key, 0, 2**16, default=shared)
    beside = MlpSpec(width * shared, activation, prefix="shared_") if shared else None
    return ExpertsSpec(count, width, spec, activation, beside)
