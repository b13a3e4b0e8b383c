"""The common part of families with Mamba-2 layers: names of tensors, and reading the mixer of a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mpillm.errors import ModelError
from mpillm.model.fields import Fields
from mpillm.model.layers.mamba2 import Mamba2Spec
from mpillm.model.layers.norm import NormSpec
from mpillm.weights.formats.gguf_config import GgufFields
from mpillm.weights.names import Roles, RowGroups

CONVOLVED = "mamba_x", "mamba_b", "mamba_c"
INPUTS: Roles = ("mamba_gate", *CONVOLVED, "mamba_dt")
CONVS: Roles = tuple(f"{role}_conv" for role in CONVOLVED)
CONV_BIASES: Roles = tuple(f"{role}_conv_bias" for role in CONVOLVED)
INPUT_BIASES: Roles = ("mamba_gate_bias", *(f"{role}_bias" for role in CONVOLVED), "mamba_dt_proj_bias")

GGUF_NAMES: Mapping[str, Roles] = {
    "blk.{l}.ssm_in.weight": INPUTS,
    "blk.{l}.ssm_conv1d.weight": CONVS,
    "blk.{l}.ssm_conv1d.bias": CONV_BIASES,
    "blk.{l}.ssm_dt.bias": ("mamba_dt_bias",),
    "blk.{l}.ssm_a": ("mamba_rates",),
    "blk.{l}.ssm_d": ("mamba_skip",),
    "blk.{l}.ssm_norm.weight": ("mamba_norm",),
    "blk.{l}.ssm_out.weight": ("mamba_out",),
}
# The MLP of Falcon-H1 and Bamba.
FEED_FORWARD: Mapping[str, Roles] = {
    f"layers.{{l}}.feed_forward.{name}_proj.{end}": (name + bias,)
    for name in ("gate", "up", "down")
    for end, bias in (("weight", ""), ("bias", "_bias"))
}
# The keys of Granite, Falcon-H1 and Bamba with the words of `read_mamba`.
USUAL_KEYS = {
    "heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "groups": "mamba_n_groups",
    "state": "mamba_d_state",
    "taps": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "bias": "mamba_proj_bias",
}
USUAL = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
}
# Keys that say how others compute and how layers begin their training.
_TRAINING = (
    "chunk_size", "mamba_chunk_size", "time_step_floor", "time_step_max", "time_step_min", "time_step_rank",
    "rescale_prenorm_residual", "residual_in_fp32", "use_mamba_kernels", "mamba_ssm_cache_dtype",
)  # fmt: skip


def hf_names(prefix: str) -> dict[str, Roles]:
    """Return the names of a mixer's tensors, which begin with `prefix`."""
    layer = f"layers.{{l}}.{prefix}."
    return {
        f"{layer}in_proj.weight": INPUTS,
        f"{layer}in_proj.bias": INPUT_BIASES,
        f"{layer}conv1d.weight": CONVS,
        f"{layer}conv1d.bias": CONV_BIASES,
        f"{layer}A_log": ("mamba_rates",),
        f"{layer}dt_bias": ("mamba_dt_bias",),
        f"{layer}D": ("mamba_skip",),
        f"{layer}norm.weight": ("mamba_norm",),
        f"{layer}out_proj.weight": ("mamba_out",),
        f"{layer}out_proj.bias": ("mamba_out_bias",),
    }


def read_mamba(
    fields: Fields, keys: Mapping[str, str], inner: int, norm: NormSpec | None, **more: Any
) -> Mamba2Spec:
    """Return the mixer with `inner` columns; `more` is what else the family says of it."""
    for key in _TRAINING:
        fields.raw(key)
    heads = fields.integer(keys["heads"], 1, 2**16)
    if fields.raw(keys["head_dim"]) in (None, "auto"):
        head_dim = inner // heads
    else:
        head_dim = fields.integer(keys["head_dim"], 1, 2**16)
    if head_dim * heads != inner or not head_dim:
        raise fields.fail(keys["heads"], f"but heads of {head_dim} dimensions do not make {inner} columns")
    groups = fields.integer(keys["groups"], 1, 2**16)
    if heads % groups:
        raise fields.fail(keys["groups"], f"but must divide {keys['heads']} ({heads})")
    return Mamba2Spec(
        groups,
        heads,
        fields.integer(keys["state"], 1, 2**16),
        head_dim,
        fields.integer(keys["taps"], 1, 2**10),
        norm,
        conv_bias=fields.flag(keys["conv_bias"], default=True),
        in_bias=fields.flag(keys["bias"]),
        out_bias=fields.flag(keys.get("out_bias", keys["bias"])),
        log_rates=not fields.flag("gguf_weights"),
        **{"dt_range": read_limit(fields), **more},
    )


def read_limit(fields: Fields) -> tuple[float, float]:
    """Return the bounds of steps; the upper one may be infinite, as JSON or transformers write it."""
    key = "time_step_limit"
    value = fields.raw(key)
    if value is None:
        return 0.0, math.inf
    if isinstance(value, list | tuple) and len(value) == 2:
        low, high = (math.inf if item == {"__float__": "Infinity"} else item for item in value)
        if type(low) in {int, float} and type(high) in {int, float} and 0 <= low <= high:
            return float(low), float(high)
    raise fields.fail(key, "but must be two numbers, from 0 up")


def mamba_rows(config: Mapping[str, Any], keys: Mapping[str, str], inner: int) -> RowGroups:
    """Return the division of a mixer's fused tensors; `config` may not have been checked yet."""

    def size(word: str) -> int:
        value = config.get(keys[word], USUAL.get(keys[word]))
        return value if type(value) is int and value > 0 else 1

    shared = size("groups") * size("state")
    inputs = inner, inner, shared, shared, size("heads")
    return {
        INPUTS: inputs,
        INPUT_BIASES: inputs,
        CONVS: (inner, shared, shared),
        CONV_BIASES: (inner, shared, shared),
    }


def gguf_mamba(fields: GgufFields, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys of a GGUF file's Mamba-2 layers, whose rates are no logarithms."""
    inner, heads = fields.integer("ssm.inner_size"), fields.integer("ssm.time_step_rank")
    if heads < 1 or inner % heads:
        raise ModelError(f"{fields.path}: {heads} heads do not divide ssm.inner_size, {inner}.")
    return {
        "gguf_weights": True,
        keys["heads"]: heads,
        keys["head_dim"]: inner // heads,
        keys["groups"]: fields.integer("ssm.group_count"),
        keys["state"]: fields.integer("ssm.state_size"),
        keys["taps"]: fields.integer("ssm.conv_kernel"),
    }
