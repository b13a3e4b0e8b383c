"""Random blocks of each of GGUF's types, whose values are as large as those of real weights."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from mpillm.kernels.blocks import CANONICAL
from mpillm.kernels.types import BlockType

POOL_BLOCKS = 99_991  # a prime, so that rows never begin where an earlier one did: no two are the same
DECAYS = -1  # stands for the columns of the rates of recurrent layers


def random_blocks(kind: Type, k: int) -> NDArray[np.uint8]:
    """Blocks of a matrix with rows of k values, uint8 [POOL_BLOCKS, block bytes].

    k = 0 is a norm's weights, DECAYS the rates of recurrent layers, which are negative.
    """
    random = np.random.default_rng(int(kind) * 1_000_003 + abs(k))
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if k in (0, DECAYS):
        values = (random.uniform(0.8, 1.2, POOL_BLOCKS) * (-1 if k else 1)).astype(np.float32)
        return values.view(np.uint8).reshape(POOL_BLOCKS, block_bytes)
    if block == 1:
        values = (random.standard_normal(POOL_BLOCKS) / k**0.5).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8).reshape(POOL_BLOCKS, block_bytes)
    blocks = random.integers(0, 256, (POOL_BLOCKS, block_bytes), np.uint8)
    # Scales have both signs, because the integers are not centred. With a mean other than zero all rows of activations
    # would become alike, and all tokens of a mixture would choose the same experts.
    scale = random.choice((-1, 1), POOL_BLOCKS) * random.uniform(0.7, 1.3, POOL_BLOCKS) / k**0.5
    if kind is Type.MXFP4:  # doubled numbers deviate by 5.8, and the exponent counts from 128
        blocks[:, 0] = np.rint(128 + np.log2(np.abs(scale) / 5.8))
    for offset, size in _SCALES[kind].items():
        blocks[:, offset : offset + 2] = (size * scale).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks


def random_scaled(kind: BlockType) -> NDArray[np.uint8]:
    """Blocks of a type that no GGUF file has, uint8 [POOL_BLOCKS, block bytes]."""
    random = np.random.default_rng(int(kind))
    blocks = np.empty(POOL_BLOCKS, CANONICAL[kind])
    for name in blocks.dtype.names or ():
        blocks[name] = random.integers(0, 256, blocks[name].shape)
    blocks["d"] = random.uniform(0.7, 1.3, POOL_BLOCKS)
    return blocks.view(np.uint8).reshape(POOL_BLOCKS, -1)


# The offsets of float16 scales in ggml's structs (ggml-common.h), and the factor that makes the standard deviation of
# random integers about one: nibbles (0..15) deviate by 4.6 from their mean 7.5, bytes by 74, IQ4's numbers by 67.
# K-quants have random scales as well.
_SCALES: dict[Type, dict[int, float]] = {
    Type.Q4_0: {0: 1 / 4.6},
    Type.Q4_1: {0: 1 / 4.6, 2: -7.5 / 4.6},
    Type.Q5_0: {0: 1 / 9.2},
    Type.Q5_1: {0: 1 / 9.2, 2: -15.5 / 9.2},
    Type.Q8_0: {0: 1 / 74},
    Type.Q4_K: {0: 1 / 250, 2: 1 / 36},
    Type.Q5_K: {0: 1 / 500, 2: 1 / 36},
    Type.Q6_K: {208: 1 / 1360},
    Type.Q3_K: {108: 1 / 43},
    Type.Q2_K: {80: 1 / 11, 82: 1 / 11},
    Type.IQ4_NL: {0: 1 / 67},
    Type.IQ4_XS: {0: 1 / 1240},
    Type.IQ3_S: {0: 1 / 167},
    Type.IQ3_XXS: {0: 1 / 170},
    Type.IQ2_S: {0: 1 / 61},
    Type.IQ2_XS: {0: 1 / 61},
    Type.IQ2_XXS: {0: 1 / 61},
    Type.MXFP4: {},
}
