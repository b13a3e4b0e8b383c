"""The kernels in NumPy, with the names, arguments and orders of summation of the compiled module.

They are used if the compiled module is missing, and tests compare the compiled kernels with them.  In products of
unquantised types and in attention they round after the multiplication (no fma), and elsewhere their fma may round
twice.  So results differ from the compiled ones by up to about k * 6e-8 of the sum of magnitudes; integers are equal.
`threads` is ignored.
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
    """Write to each page of new memory, the threads in turn; the contents are undefined afterwards.

    The kernel places a page on the NUMA node of the thread that touches it first. The twin has no threads and does
    nothing.
    """
