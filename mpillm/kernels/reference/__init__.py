"""The kernels in NumPy: same names, arguments and orders of summation as the compiled module.

They serve where nothing could be compiled, and tests compare the compiled ones with them.  Differences: products of
unquantised types and attention round after the multiplication (no fma), and fma elsewhere may round ties twice; so
results agree with the compiled ones within about k * 6e-8 of the sum of magnitudes, and exactly for integers.
`threads` is accepted and not used.
"""

from __future__ import annotations

from mpillm.kernels.reference.cached import attention, kv_store
from mpillm.kernels.reference.products import dequantize, matmul, pack, quantize, quantize_rows
from mpillm.kernels.reference.recurrent import decays, delta_rule, selective_scan, short_conv
from mpillm.kernels.reference.rows import (
    activate,
    fold,
    layer_norm,
    lse_parts,
    rms_norm,
    rope,
    softcap,
    softmax,
    square_sums,
    top_k,
)
from mpillm.kernels.types import U8, activation_nbytes, packed_nbytes

__all__ = [
    "activate", "activation_nbytes", "attention", "decays", "delta_rule", "dequantize", "first_touch", "fold",
    "kv_store", "layer_norm", "lse_parts", "matmul", "pack", "packed_nbytes", "quantize", "quantize_rows", "rms_norm",
    "rope", "selective_scan", "short_conv", "softcap", "softmax", "square_sums", "top_k",
]  # fmt: skip


def first_touch(memory: U8, threads: int = 1) -> None:
    """Write to each page of new memory, in turn by each thread; its values are then undefined.

    Memory is allocated on the NUMA node of the thread that touches it first. NumPy has no threads of its own, so here
    nothing is done.
    """
