"""The part of a sequence that a layer keeps between steps, as data: blocks of tokens, or one state of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Keys of `k_dim` and values of `v_dim` numbers for each token and each of a rank's `kv_heads` KV heads.

    `v_dim` is 0 where values are a part of the keys.

    With a `window` above 0 a token attends to itself and to the `window - 1` tokens before it, so only those are kept.
    What is not `kept` after a step has memory in common with other layers, which overwrite it.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    window: int = 0
    kept: bool = True


@dataclass(frozen=True, slots=True)
class SequenceState:
    """`nbytes` bytes for each sequence, however long it is (a recurrent state, the tail of a convolution)."""

    nbytes: int


LayerCache = TokenCache | SequenceState
