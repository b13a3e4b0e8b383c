"""The compute kernels: the compiled module if it can be imported, else its NumPy twin with the same functions.

`MPILLM_KERNELS` selects a path by name (`numpy` is the twin).  All compiled paths return the same bits; the twin's
results differ from them within the tolerance that `reference` states.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mpillm.errors import JobError
from mpillm.kernels import fused, reference
from mpillm.kernels.fused import (
    Attention,
    Expert,
    Experts,
    GatedConvolution,
    GatedDeltaNet,
    LatentAttention,
    LayerStack,
    Mamba2,
    Mlp,
    Products,
    Residual,
)
from mpillm.kernels.installed import installed_kernels
from mpillm.kernels.reference import (
    activate,
    activation_nbytes,
    attention,
    decays,
    delta_rule,
    dequantize,
    first_touch,
    fold,
    kv_store,
    layer_norm,
    lse_parts,
    matmul,
    pack,
    packed_nbytes,
    quantize,
    quantize_rows,
    rms_norm,
    rope,
    selective_scan,
    short_conv,
    softcap,
    softmax,
    square_sums,
    top_k,
)
from mpillm.kernels.types import (
    ACTIVATION_BLOCK_BYTES,
    KV_BLOCK,
    QUANT_BLOCK,
    TILE_ROWS,
    Activation,
    BlockType,
    KvType,
    Norm,
    delta_floats,
    kv_pools,
)

__all__ = [
    "ACTIVATION_BLOCK_BYTES", "KV_BLOCK", "QUANT_BLOCK", "TILE_ROWS", "Activation", "Attention", "BlockType",
    "Expert", "Experts", "GatedConvolution", "GatedDeltaNet", "KvType", "LatentAttention", "LayerStack", "Mamba2",
    "Mlp", "Norm", "Products", "Residual",
    "activate", "activation_nbytes", "attention", "available", "compute", "decays", "delta_floats", "delta_rule",
    "dequantize", "first_touch", "fold", "kv_pools", "kv_store", "layer_norm", "lse_parts", "matmul", "pack",
    "packed_nbytes", "path", "quantize", "quantize_rows", "rms_norm", "rope", "selective_scan", "set_path",
    "short_conv", "softcap", "softmax", "square_sums", "top_k", "why_missing",
]  # fmt: skip

SHARED = ("activation_nbytes", "packed_nbytes")  # pure functions of shapes, the same for all paths
FUSED = (
    "Attention",
    "Expert",
    "Experts",
    "GatedConvolution",
    "GatedDeltaNet",
    "LatentAttention",
    "LayerStack",
    "Mamba2",
    "Mlp",
    "Products",
    "Residual",
)

_compiled: Any = None
_why = ""
try:
    _compiled = importlib.import_module("mpillm.kernels._compiled")
except ImportError as error:
    _installed, _why = installed_kernels(Path(__file__).resolve().parent)
    _why = _why or str(error)
    if _installed is not None:
        __path__.append(str(_installed))
        try:
            _compiled, _why = importlib.import_module("mpillm.kernels._compiled"), ""
        except ImportError as other:  # the kernels were compiled for another Python
            _why = str(other)


def compute(work: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Call a fused object through this package, as single kernels are called, so that a caller can time it."""
    work(*arguments, **options)


def path() -> str:
    """Return the name of the path in use."""
    return _path


def available() -> tuple[str, ...]:
    """Return the paths that this machine can run, slowest first; the last compiled one is the default."""
    return ("numpy", *(_compiled.available() if _compiled else ()))


def why_missing() -> str:
    """Return why the compiled kernels cannot be used, or "" if they can."""
    return _why


def set_path(name: str) -> None:
    """Use another path; raises JobError if this machine lacks it."""
    if name not in available():
        choice = ", ".join(available())
        raise JobError(f"MPILLM_KERNELS = {name} cannot be used on this machine; choose from {choice}")
    if name == "numpy":
        _bind(name, reference, fused)
    else:
        _compiled.set_path(name)
        _bind(name, _compiled, _compiled)


def _bind(name: str, module: ModuleType, of_fused: ModuleType) -> None:
    """Export the functions and classes of these modules from this package."""
    wanted = {f: getattr(module, f) for f in reference.__all__ if f not in SHARED}
    globals().update(wanted, **{c: getattr(of_fused, c) for c in FUSED}, _path=name)


_path = "numpy"
_forced = os.environ.get("MPILLM_KERNELS", "")
if _forced:
    set_path(_forced)
elif _compiled:
    set_path(available()[-1])
else:
    logging.getLogger(__name__).warning(
        "the compiled kernels are missing (%s); NumPy computes instead, far slower "
        "(MPILLM_KERNELS=numpy silences this warning)",
        _why,
    )
