"""Parts of layers as sequences of single kernels; in the compiled module each of these classes is one call.

Shapes: x [m, d], contiguous rows; a matrix is anything with `type, data, n, k, bounds` as `matmul` takes them,
or with `parts` that are such matrices: with all of its columns, one under the other, or with all of its rows and
one or several of its column panels each, side by side.
"""

from __future__ import annotations

from mpillm.kernels.fused.attention import Attention, LatentAttention
from mpillm.kernels.fused.mlp import Expert, Experts, Mlp
from mpillm.kernels.fused.products import Products
from mpillm.kernels.fused.recurrent import GatedConvolution, GatedDeltaNet, Mamba2
from mpillm.kernels.fused.stack import LayerStack, Residual

__all__ = [
    "Attention", "Expert", "Experts", "GatedConvolution", "GatedDeltaNet", "LatentAttention", "LayerStack", "Mamba2",
    "Mlp", "Products", "Residual",
]  # fmt: skip
