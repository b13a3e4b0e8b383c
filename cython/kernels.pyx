# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The compiled kernels: each function checks its arguments, lets the GIL go and calls core/kernels.h.

The NumPy twins in mpillm/kernels/reference have the same arguments, shapes, layouts and error messages. The files that
are included below have a subject each; Cython makes one module of all.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t

import numpy as np

from mpillm.kernels.types import MISFIT, Misfit

include "declarations.pxi"  # what core/kernels.h declares; setup.py makes it


def available():
    """Return the names of the paths that this build has and this machine can run, slowest first."""
    names = []
    while mk_path_name(len(names)) != NULL:
        names.append(mk_path_name(len(names)).decode())
    return tuple(names)


def set_path(str name):
    """Use a path; raises ValueError if it is not in `available()`."""
    if mk_set_path(name.encode()):
        raise ValueError(f"this machine has no kernel path {name!r}")


def block_types():
    """Return the kind, the values, the bytes and the packed bytes of a block of each type."""
    kinds = ("float", "plain", "super", "coded", "scaled", "panel")
    return [(kinds[mk_kind(type)], mk_block(type), mk_block_bytes(type), mk_packed_bytes(type))
            for type in range(MK_TYPES)]


include "checks.pxi"
include "work.pxi"
include "blocks.pxi"
include "products.pxi"
include "rows.pxi"
include "states.pxi"
# Each of the following files has calls of several operations. Their NumPy twins are in mpillm/kernels/fused.
include "norms.pxi"
include "attention.pxi"
include "latent.pxi"
include "recurrent.pxi"
include "mlp.pxi"
include "stack.pxi"
