"""The form of a tensor in its file, and the type in which it is delivered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.kernels.types import BlockType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Stored:
    """A block type of some file format: `block` values lie in `block_bytes` bytes.

    `type` is what `read` delivers. `own` says whether the stored blocks are already of that type; if not, they are
    decoded by the gguf library (`code` is its number, else -1) and quantised to Q8_0.
    """

    name: str
    block: int
    block_bytes: int
    type: BlockType
    own: bool
    code: int = -1

    @property
    def quantised(self) -> bool:
        """True if the file holds less than 16-bit floats."""
        return not self.own or self.type.quantised

    def row_bytes(self, k: int) -> int:
        """Return bytes of a row of k values in the file, which `fits` (checked when the file is opened)."""
        return -(-k // self.block) * self.block_bytes

    def working_row_bytes(self, k: int) -> int:
        """Return bytes that a row of k values takes while it is read; the library holds float32 values three times."""
        return self.row_bytes(k) if self.own else 4 * k * 4

    def fits(self, k: int) -> bool:
        """Return whether a row may have k values: whole blocks, but for scaled ones, which are filled up here."""
        return k % self.block == 0 or (self.own and self.type.scaled)

    def decode(self, raw: Bytes, k: int, threads: int) -> Floats:
        """Values [n, k] of n stored rows."""
        if self.own:
            out = np.empty((len(raw), k), np.float32)
            kernels.dequantize(self.type, np.ascontiguousarray(raw), k, out, threads)
            return out
        import gguf.quants

        kind = gguf.GGMLQuantizationType(self.code)
        with np.errstate(
            all="ignore"
        ):  # a damaged block's scale may be anything: its values are then infinite
            return gguf.quants.dequantize(np.ascontiguousarray(raw), kind).astype(np.float32, copy=False)


OWN: dict[str, Stored] = {
    type.name: Stored(type.name, type.block, type.block_bytes, type, True)
    for type in BlockType
    if not type.coded
}
# The numbers of ggml's types that are ours too. (The gguf library has them, but takes 25 ms to import.)
_CODES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    30: "BF16",
    39: "MXFP4",
}


@lru_cache(maxsize=128)
def stored_in_gguf(code: int) -> Stored | None:
    """Return the ggml type of that number; None if the gguf library does not know it or cannot decode it."""
    if code in _CODES:
        return OWN[_CODES[code]]
    import gguf.quants

    try:
        kind = gguf.GGMLQuantizationType(code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return None
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return None
    return Stored(kind.name, block, block_bytes, BlockType.Q8_0, False, code)
