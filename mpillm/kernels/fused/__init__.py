"""Parts of layers as sequences of single kernels; in the compiled module each of these classes is one call.

Shapes: x [m, d] has contiguous rows. A matrix has the attributes `type, data, n, k, bounds` that `matmul` takes, or
`parts`, which are such matrices: groups of its rows, one under the other, or groups of its column panels, side by side.
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
