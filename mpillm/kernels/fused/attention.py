"""Attention over keys and values of heads, and over latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.kernels.fused.products import Fused, Packed
from mpillm.kernels.types import F32, I32, Activation, KvType, Norm

Pool = npt.NDArray[Any]


class Attention(Fused):
    """out [m, d] = o(attention(rope(q), rope(k), v)) of x [m, d]; the keys and values of the rows are stored first.

    `norm` normalises x. Each of the `biases` of q, k and v may be None. `qk_norms` normalise q and k before RoPE, or
    after it with `normed_after_rope`; `v_norm` normalises v. These norms apply to each head if they are as wide as a
    head, else to whole rows. RoPE rotates `rotary` dimensions of each head: None means all; 0 means none, and cos and
    sin are ignored. A head has hd dimensions of q and k, and `value_dim` (0: hd) of v.
    `reference.attention` describes `sinks`, `softcap`, `chunked`, `tuning` and `bidirectional`. With a `gate`
    [heads * value_dim, d] the heads' output is multiplied by sigmoid(gate(x) + gate_bias). `Residual` adds o's bias and
    x afterwards.
    """

    def __init__(self, q: Packed, k: Packed, v: Packed, o: Packed, kv_of_head: I32, kvh: int, hd: int, scale: float, *,
                 window: int = 0, value_dim: int = 0, norm: Norm | None = None,
                 biases: tuple[F32 | None, F32 | None, F32 | None] | None = None,
                 qk_norms: tuple[Norm | None, Norm | None] | None = None, rotary: int | None = None,
                 interleaved: bool = False, sinks: F32 | None = None, softcap: float = 0.0,
                 gate: Packed | None = None, chunked: bool = False,
                 tuning: tuple[float, int, int] | None = None, v_norm: Norm | None = None,
                 normed_after_rope: bool = False, bidirectional: bool = False,
                 gate_bias: F32 | None = None) -> None:  # fmt: skip
        self._gate_bias = gate_bias
        self._qkv, self._o, self._norm_before, self._gate = (q, k, v), o, norm, gate
        self._kv_of_head, self._kvh, self._hd, self._value_dim = kv_of_head, kvh, hd, value_dim or hd
        self._scale, self._window, self._sinks, self._softcap = scale, window, sinks, softcap
        self._chunked, self._tuning, self._v_norm = chunked, tuning, v_norm
        self._normed_after_rope, self._bidirectional = normed_after_rope, bidirectional
        self._biases, self._qk_norms = biases or (None, None, None), qk_norms or (None, None)
        self._rotary, self._interleaved = hd if rotary is None else rotary, interleaved

    def __call__(self, x: F32, cos: F32 | None, sin: F32 | None, kv_type: KvType, kpool: Pool, vpool: Pool,
                 block: I32, offset: I32, pos: I32, table: I32, table_start: I32, out: F32,
                 threads: int = 1) -> None:  # fmt: skip
        rows = self._norm(x, self._norm_before, threads)
        q, k, v = self._biased(rows, self._qkv, self._biases, threads)
        if not self._normed_after_rope:
            q, k = self._norms(q, k, threads)
        v = self._norm_heads(v, self._v_norm, self._kvh, threads)
        gate = None
        if self._gate is not None:
            (gate,) = self._biased(rows, [self._gate], [self._gate_bias], threads)
        self._attend(q, k, v, gate, cos, sin, kv_type, kpool, vpool, block, offset, pos, table, table_start, out,
                     threads)  # fmt: skip

    def attend(self, q: F32, k: F32, v: F32, cos: F32 | None, sin: F32 | None, kv_type: KvType, kpool: Pool,
               vpool: Pool, block: I32, offset: I32, pos: I32, table: I32, table_start: I32, out: F32,
               threads: int = 1) -> None:  # fmt: skip
        """Compute attention from the caller's q [m, heads * hd], k and v; rotates q and k in place."""
        if self._gate is not None:
            raise ValueError("attention with a gate begins with its rows x, of which the gate is made")
        if self._normed_after_rope:
            raise ValueError("attention that normalises after rope begins with its rows x")
        self._attend(q, k, v, None, cos, sin, kv_type, kpool, vpool, block, offset, pos, table, table_start, out,
                     threads)  # fmt: skip

    def _norms(self, q: F32, k: F32, threads: int) -> tuple[F32, F32]:
        q_norm, k_norm = self._qk_norms
        return (
            self._norm_heads(q, q_norm, len(self._kv_of_head), threads),
            self._norm_heads(k, k_norm, self._kvh, threads),
        )

    def _attend(self, q: F32, k: F32, v: F32, gate: F32 | None, cos: F32 | None, sin: F32 | None, kv_type: KvType,
                kpool: Pool, vpool: Pool, block: I32, offset: I32, pos: I32, table: I32, table_start: I32, out: F32,
                threads: int) -> None:  # fmt: skip
        ops = self.ops
        if self._rotary:
            for values, heads in ((q, len(self._kv_of_head)), (k, self._kvh)):
                ops.rope(values, cos, sin, heads, self._hd, threads, self._rotary, self._interleaved)
        if self._normed_after_rope:
            q, k = self._norms(q, k, threads)
        ops.kv_store(kv_type, k, v, block, offset, kpool, vpool, self._kvh, self._hd, self._value_dim)
        mixed = np.empty((len(q), len(self._kv_of_head) * self._value_dim), np.float32)
        ops.attention(kv_type, q, mixed, kpool, vpool, pos, table, table_start, self._kv_of_head, self._kvh, self._hd,
                      self._scale, self._window, threads, self._value_dim, self._sinks, self._softcap,
                      self._chunked, self._tuning, self._bidirectional)  # fmt: skip
        if gate is not None:
            ops.activate(Activation.SIGMOID, gate, mixed, mixed, threads)
        self._multiply(mixed, self._o, out, threads)


class LatentAttention(Fused):
    """Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1), of x [m, d] to out [m, d].

    kv_a(x) yields a latent, which `kv_norm` normalises, and a key part that all heads share, which is rotated. Both
    together are stored as the key of one KV head; its value is the latent. q(x), or q(q_norm(q_a(x))) with low rank,
    has two parts for each head: one for the latent, one that is rotated. k_b[i] [latent, part] maps the first part of
    head i to latent space, and v_b[i] [value, latent] maps the output of attention to the head's value, so latents are
    never expanded to the heads' keys and values. o maps these values to out.

    `norm` normalises x. Each of the `biases` of q_a and kv_a may be None. `Residual` adds o's bias and x afterwards.
    """

    def __init__(self, q: Packed, kv_a: Packed, k_b: Sequence[Packed], v_b: Sequence[Packed], o: Packed,
                 scale: float, *, kv_norm: Norm, q_a: Packed | None = None, q_norm: Norm | None = None,
                 norm: Norm | None = None, biases: tuple[F32 | None, F32 | None] | None = None,
                 interleaved: bool = True) -> None:  # fmt: skip
        self._q, self._q_a, self._kv_a, self._o, self._scale = q, q_a, kv_a, o, scale
        self._k_b, self._v_b, self._interleaved = tuple(k_b), tuple(v_b), interleaved
        self._norm_before, self._q_norm, self._kv_norm = norm, q_norm, kv_norm
        self._biases = biases or (None, None)
        self._latent, self._nope, self._value_dim = k_b[0].n, k_b[0].k, v_b[0].n
        self._rotary = kv_a.n - self._latent

    def __call__(self, x: F32, cos: F32, sin: F32, kv_type: KvType, kpool: Pool, vpool: object, block: I32,
                 offset: I32, pos: I32, table: I32, table_start: I32, out: F32, threads: int = 1) -> None:  # fmt: skip
        """`vpool` is ignored: the values are a part of the keys."""
        ops, m, heads, latent, nope = self.ops, len(x), len(self._k_b), self._latent, self._nope
        rows = self._norm(x, self._norm_before, threads)
        low = rows
        if self._q_a is not None:
            low = self._times(rows, self._q_a, threads)
            if self._biases[0] is not None:
                low += self._biases[0]
            low = self._norm(low, self._q_norm, threads)
        q = self._times(low, self._q, threads).reshape(m, heads, nope + self._rotary)
        keys = self._times(rows, self._kv_a, threads)
        if self._biases[1] is not None:
            keys += self._biases[1]
        keys[:, :latent] = self._norm(keys[:, :latent], self._kv_norm, threads)
        self._rotate(keys[:, None, latent:], cos, sin, threads)
        queries = np.empty((m, heads, keys.shape[1]), np.float32)
        for head, matrix in enumerate(self._k_b):
            queries[:, head, :latent] = self._times(np.ascontiguousarray(q[:, head, :nope]), matrix, threads)
        queries[:, :, latent:] = q[:, :, nope:]
        self._rotate(queries[:, :, latent:], cos, sin, threads)
        ops.kv_store(kv_type, keys, None, block, offset, kpool, None, 1, keys.shape[1], latent)
        mixed = np.empty((m, heads * latent), np.float32)
        ops.attention(kv_type, queries.reshape(m, -1), mixed, kpool, None, pos, table, table_start,
                      np.zeros(heads, np.int32), 1, keys.shape[1], self._scale, 0, threads, latent)  # fmt: skip
        made = np.empty((m, heads, self._value_dim), np.float32)
        for head, matrix in enumerate(self._v_b):
            part = np.ascontiguousarray(mixed[:, head * latent : (head + 1) * latent])
            made[:, head] = self._times(part, matrix, threads)
        self._multiply(made.reshape(m, -1), self._o, out, threads)

    def _rotate(self, x: F32, cos: F32, sin: F32, threads: int) -> None:
        """Apply RoPE in place to x [m, heads, rotary], which is a view."""
        turned = np.ascontiguousarray(x).reshape(len(x), -1)
        self.ops.rope(turned, cos, sin, x.shape[1], x.shape[2], threads, x.shape[2], self._interleaved)
        x[:] = turned.reshape(x.shape)
