"""Parts of layers in terms of the single kernels; the compiled module has the same classes as one piece of work each.

Shapes: x [m, d], contiguous rows; a matrix is anything with `type, data, n, k, bounds` as `matmul` takes them,
or with `parts` that are such matrices: with all of its columns, one under the other, or with all of its rows and
one or several of its column panels each, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpillm.kernels import reference
from mpillm.kernels.checks import require_activation
from mpillm.kernels.types import F32, I32, U8, Activation, BlockType, Bounds, Norm, activation_nbytes

Pool = npt.NDArray[Any]
Where = tuple[
    F32, F32, I32, I32, I32, I32, I32
]  # cos, sin, block, offset, pos, table, table_start of a step's rows


class Packed(Protocol):
    """A matrix [n, k] with its column panels: packed, or rows of floats `row_bytes` apart."""

    @property
    def type(self) -> BlockType: ...
    @property
    def data(self) -> U8: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def bounds(self) -> Bounds: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def parts(self) -> Sequence[Packed]: ...


class _Fused:
    ops: Any = reference  # the module whose kernels are called

    def _times(self, x: F32, matrix: Packed, threads: int) -> F32:
        out = np.empty((len(x), matrix.n), np.float32)
        self._multiply(x, matrix, out, threads)
        return out

    def _multiply(self, x: F32, matrix: Packed, out: F32, threads: int, fold: bool = True) -> None:
        if not matrix.parts:
            self._product(x, matrix, out, threads, fold)
        elif len(matrix.parts[0].bounds) == len(matrix.bounds):
            row = 0
            for part in matrix.parts:
                self._product(x, part, out[..., row : row + part.n], threads, fold)
                row += part.n
        else:
            sums = np.empty((len(matrix.bounds) - 1, len(x), matrix.n), np.float32) if fold else out
            column = panel = 0
            for part in matrix.parts:
                count = len(part.bounds) - 1
                columns = np.ascontiguousarray(x[:, column : column + part.k])
                self._product(columns, part, sums[panel : panel + count], threads, fold=False)
                column, panel = column + part.k, panel + count
            if fold:
                self.ops.fold(sums, out, threads)

    def _product(self, x: F32, matrix: Packed, out: F32, threads: int, fold: bool) -> None:
        rows: npt.NDArray[Any] = x
        if matrix.type.quantised:
            rows = np.empty((len(x), activation_nbytes(matrix.k, matrix.bounds)), np.uint8)
            self.ops.quantize_rows(x, matrix.bounds, rows, threads)
        self.ops.matmul(matrix.type, matrix.data, matrix.n, matrix.k, matrix.bounds, rows, out, threads, fold,
                        matrix.row_bytes)  # fmt: skip

    def _norm(self, x: F32, norm: Norm | None, threads: int, groups: int = 1) -> F32:
        if norm is None:
            return x
        out = np.empty(x.shape, np.float32)
        if norm.centred:
            self.ops.layer_norm(x, norm.weight, norm.bias, norm.eps, out, threads)
        else:
            self.ops.rms_norm(x, norm.weight, norm.eps, out, threads, groups)
        return out

    def _norm_heads(self, x: F32, norm: Norm | None, heads: int, threads: int) -> F32:
        """x [m, heads * hd] with each head normalised by itself, or whole rows, as the norm is wide."""
        if norm is None or norm.width == x.shape[1]:
            return self._norm(x, norm, threads, heads)
        return self._norm(x.reshape(-1, norm.width), norm, threads).reshape(x.shape)


class Products(_Fused):
    """Products of the same rows x [m, k], C-contiguous, with several matrices: outs[i] [m, n] = x @ matrix i .T."""

    def __init__(self, *matrices: Packed) -> None:
        self._matrices = matrices

    def __call__(self, x: F32, outs: Sequence[F32], threads: int = 1) -> None:
        for matrix, out in zip(self._matrices, outs, strict=True):
            self._multiply(x, matrix, out, threads)


class Attention(_Fused):
    """out [m, d] = o(attention(rope(q), rope(k), v)) of x [m, d]; the rows' keys and values are stored first.

    `norm` normalises x. `biases` of q, k and v may be None each. `qk_norms` normalise q and k before rope: every head
    by itself if the norm is hd wide, else whole rows. rope rotates `rotary` dimensions of each head: all with None,
    none with 0, where cos and sin are ignored. A head has hd dimensions of q and k, and `value_dim` (0: hd) of v.
    `sinks` and `softcap` are described at `reference.attention`. What the heads make is multiplied by the sigmoid of
    gate(x), if there is a `gate` [heads * value_dim, d]. out has neither o's bias nor x added (`Residual`).
    """

    def __init__(self, q: Packed, k: Packed, v: Packed, o: Packed, kv_of_head: I32, kvh: int, hd: int, scale: float, *,
                 window: int = 0, value_dim: int = 0, norm: Norm | None = None,
                 biases: tuple[F32 | None, F32 | None, F32 | None] | None = None,
                 qk_norms: tuple[Norm | None, Norm | None] | None = None, rotary: int | None = None,
                 interleaved: bool = False, sinks: F32 | None = None, softcap: float = 0.0,
                 gate: Packed | None = None) -> None:  # fmt: skip
        self._qkv, self._o, self._norm_before, self._gate = (q, k, v), o, norm, gate
        self._kv_of_head, self._kvh, self._hd, self._value_dim = kv_of_head, kvh, hd, value_dim or hd
        self._scale, self._window, self._sinks, self._softcap = scale, window, sinks, softcap
        self._biases, self._qk_norms = biases or (None, None, None), qk_norms or (None, None)
        self._rotary, self._interleaved = hd if rotary is None else rotary, interleaved

    def __call__(self, x: F32, cos: F32 | None, sin: F32 | None, kv_type: BlockType, kpool: Pool, vpool: Pool,
                 block: I32, offset: I32, pos: I32, table: I32, table_start: I32, out: F32,
                 threads: int = 1) -> None:  # fmt: skip
        rows = self._norm(x, self._norm_before, threads)
        q, k, v = (self._times(rows, matrix, threads) for matrix in self._qkv)
        for values, bias in zip((q, k, v), self._biases, strict=True):
            if bias is not None:
                values += bias
        q = self._norm_heads(q, self._qk_norms[0], len(self._kv_of_head), threads)
        k = self._norm_heads(k, self._qk_norms[1], self._kvh, threads)
        gate = None if self._gate is None else self._times(rows, self._gate, threads)
        self._attend(q, k, v, gate, cos, sin, kv_type, kpool, vpool, block, offset, pos, table, table_start, out,
                     threads)  # fmt: skip

    def attend(self, q: F32, k: F32, v: F32, cos: F32 | None, sin: F32 | None, kv_type: BlockType, kpool: Pool,
               vpool: Pool, block: I32, offset: I32, pos: I32, table: I32, table_start: I32, out: F32,
               threads: int = 1) -> None:  # fmt: skip
        """The same from q [m, heads * hd], k and v that the caller computed; q and k are rotated in place."""
        if self._gate is not None:
            raise ValueError("attention with a gate begins with its rows x, of which the gate is made")
        self._attend(q, k, v, None, cos, sin, kv_type, kpool, vpool, block, offset, pos, table, table_start, out,
                     threads)  # fmt: skip

    def _attend(self, q: F32, k: F32, v: F32, gate: F32 | None, cos: F32 | None, sin: F32 | None, kv_type: BlockType,
                kpool: Pool, vpool: Pool, block: I32, offset: I32, pos: I32, table: I32, table_start: I32, out: F32,
                threads: int) -> None:  # fmt: skip
        ops = self.ops
        if self._rotary:
            for values, heads in ((q, len(self._kv_of_head)), (k, self._kvh)):
                ops.rope(values, cos, sin, heads, self._hd, threads, self._rotary, self._interleaved)
        ops.kv_store(kv_type, k, v, block, offset, kpool, vpool, self._kvh, self._hd, self._value_dim)
        mixed = np.empty((len(q), len(self._kv_of_head) * self._value_dim), np.float32)
        ops.attention(kv_type, q, mixed, kpool, vpool, pos, table, table_start, self._kv_of_head, self._kvh, self._hd,
                      self._scale, self._window, threads, self._value_dim, self._sinks, self._softcap)  # fmt: skip
        if gate is not None:
            ops.activate(Activation.SIGMOID, gate, mixed, mixed, threads)
        self._multiply(mixed, self._o, out, threads)


class GatedDeltaNet(_Fused):
    """out [m, d] = o(norm(delta rule(q, k, v)) * silu(gate)) of x [m, d], which `norm` normalises first.

    q, k and v pass a convolution of a few taps with SiLU: `convs` are the three, [taps, channels]. q and k are then
    divided by their lengths (`eps` is added to the squares), q by sqrt(dk) too. A head's state decays by
    e^(rates * softplus(alpha(x) + dt_bias)), and sigmoid(beta(x)) says how much of it is written over. `out_norm`, dv
    wide, normalises each head. `states` f32 [slot, floats] begin with the last rows before the convolutions, q's, k's
    and v's, each [taps - 1, channels]; then come the heads' states (`reference.delta_rule`).
    """

    def __init__(self, q: Packed, k: Packed, v: Packed, gate: Packed, beta: Packed, alpha: Packed, o: Packed,
                 convs: tuple[F32, F32, F32], rates: F32, dt_bias: F32, key_of_head: I32, dk: int, dv: int,
                 out_norm: Norm, *, norm: Norm | None = None, eps: float = 1e-6) -> None:  # fmt: skip
        self._inputs, self._o, self._convs = (q, k, v, gate, beta, alpha), o, convs
        self._rates, self._dt_bias, self._key_of_head = rates, dt_bias, key_of_head
        self._dk, self._dv, self._out_norm, self._norm_before, self._eps = dk, dv, out_norm, norm, eps

    def __call__(self, x: F32, states: F32, first_rows: I32, slots: I32, out: F32, threads: int = 1) -> None:
        ops, dk, begin = self.ops, self._dk, 0
        rows = self._norm(x, self._norm_before, threads)
        *qkv, gate, beta, decay = (self._times(rows, matrix, threads) for matrix in self._inputs)
        for i, w in enumerate(self._convs):
            convolved, floats = np.empty_like(qkv[i]), (len(w) - 1) * w.shape[1]
            ops.short_conv(qkv[i], w, None, states[:, begin : begin + floats], first_rows, slots, convolved, True,
                           threads)  # fmt: skip
            qkv[i], begin = convolved, begin + floats
        ops.activate(Activation.SIGMOID, beta, None, beta, threads)
        ops.decays(decay, self._rates, self._dt_bias, threads)
        # x / sqrt(sum(x^2) + eps) is the RMS norm with eps / dk, over sqrt(dk); q is divided by another sqrt(dk).
        q, k = (
            self._norm_heads(part, Norm(dk, self._eps / dk, np.full(dk, scale, np.float32)), 1, threads)
            for part, scale in zip(qkv[:2], (1 / dk, dk**-0.5), strict=True)
        )
        made = np.empty_like(qkv[2])
        ops.delta_rule(q, k, qkv[2], decay, beta, states[:, begin:], first_rows, slots, self._key_of_head, dk,
                       self._dv, made, threads)  # fmt: skip
        made = self._norm_heads(made, self._out_norm, 1, threads)
        ops.activate(Activation.SILU, gate, made, made, threads)
        self._multiply(made, self._o, out, threads)


class LatentAttention(_Fused):
    """Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1), of x [m, d] to out [m, d].

    kv_a(x) is a latent, which `kv_norm` normalises, and a key that all heads share, which is rotated; both together are
    stored as the key of one KV head, whose value is the latent. q(x), or with a low rank q(q_norm(q_a(x))), has for
    each head a part that meets the latent and a part that is rotated. Head i's matrix k_b[i] [latent, part] takes the
    first part into the space of latents, and v_b[i] [value, latent] takes what attention makes there to the head's
    value: latents are never expanded to keys and values of heads. out is the product of o with these values.

    `norm` is that of x, `biases` those of q_a and kv_a (each may be None). out has neither o's bias nor x added.
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

    def __call__(self, x: F32, cos: F32, sin: F32, kv_type: BlockType, kpool: Pool, vpool: object, block: I32,
                 offset: I32, pos: I32, table: I32, table_start: I32, out: F32, threads: int = 1) -> None:  # fmt: skip
        """vpool is not used: values are a part of the keys."""
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
        """RoPE of x [m, heads, rotary], a view, in place."""
        turned = np.ascontiguousarray(x).reshape(len(x), -1)
        self.ops.rope(turned, cos, sin, x.shape[1], x.shape[2], threads, x.shape[2], self._interleaved)
        x[:] = turned.reshape(x.shape)


class _MlpMatrices(_Fused):
    """gate (or None), up and down, and the activation between them."""

    def __init__(self, gate: Packed | None, up: Packed, down: Packed, biases: tuple[F32 | None, F32 | None] | None,
                 activation: Activation, limit: float, alpha: float) -> None:  # fmt: skip
        self._matrices, self._down, self._biases = (gate, up), down, biases or (None, None)
        self._activation = require_activation(activation, gate is not None, limit), limit, alpha

    def __call__(self, x: F32, out: F32, threads: int, fold: bool) -> None:
        gate, up = (
            self._input(x, matrix, bias, threads)
            for matrix, bias in zip(self._matrices, self._biases, strict=True)
        )
        assert up is not None
        kind, limit, alpha = self._activation
        first, factor = (up, None) if gate is None else (gate, up)
        self.ops.activate(kind, first, factor, first, threads, limit, alpha)
        self._multiply(first, self._down, out, threads, fold)

    def _input(self, x: F32, matrix: Packed | None, bias: F32 | None, threads: int) -> F32 | None:
        if matrix is None:
            return None
        values = self._times(x, matrix, threads)
        if bias is not None:
            values += bias
        return values


class Mlp(_Fused):
    """out = down(f(gate(x)) * up(x)) of x [m, d], or without a gate down(f(up(x))): [m, d], or panels [P, m, d].

    `norm` is that of x, `biases` are those of gate and up (each may be missing), f is the `activation`.
    """

    def __init__(self, gate: Packed | None, up: Packed, down: Packed, *, activation: Activation = Activation.SILU,
                 limit: float = 0.0, alpha: float = 1.702, norm: Norm | None = None,
                 biases: tuple[F32 | None, F32 | None] | None = None) -> None:  # fmt: skip
        self._matrices = _MlpMatrices(gate, up, down, biases, activation, limit, alpha)
        self._norm_before = norm

    def __call__(self, x: F32, out: F32, threads: int = 1, fold: bool = True) -> None:
        self._matrices.ops = self.ops
        self._matrices(self._norm(x, self._norm_before, threads), out, threads, fold)


class Expert:
    """The matrices of one of the `Experts`, and their biases; `down_bias` only where the first column panel is."""

    def __init__(self, gate: Packed | None, up: Packed, down: Packed, *,
                 biases: tuple[F32 | None, F32 | None] | None = None,
                 down_bias: F32 | None = None) -> None:  # fmt: skip
        self.matrices, self.biases, self.down_bias = (gate, up, down), biases, down_bias


class Experts(_Fused):
    """Add to column panels [P, m, d] what experts make of rows of h [m, k], C-contiguous, times weights.

    Rows `at[starts[i]:starts[i + 1]]`, at least one, go to expert i, and weights likewise. Experts are added in their
    order, the bias of an expert's down before its product. Panels are folded after the last expert, by the caller: so
    the sums are the same for any number of shards.
    """

    def __init__(self, experts: Sequence[Expert], *, activation: Activation = Activation.SILU, limit: float = 0.0,
                 alpha: float = 1.702) -> None:  # fmt: skip
        self._experts, self._activation = experts, (activation, limit, alpha)

    def __call__(self, h: F32, at: I32, starts: I32, weights: F32, panels: F32, threads: int = 1) -> None:
        for expert, begin, end in zip(self._experts, starts[:-1], starts[1:], strict=True):
            matrices = _MlpMatrices(*expert.matrices, expert.biases, *self._activation)
            matrices.ops = self.ops
            rows, share = at[begin:end], weights[begin:end, None]
            sums = np.empty((len(panels), len(rows), panels.shape[2]), np.float32)
            matrices(np.ascontiguousarray(h[rows]), sums, threads, False)
            if expert.down_bias is not None:
                panels[0, rows] += share * expert.down_bias
            panels[:, rows] += share * sums


class Residual(_Fused):
    """x [m, d] += scale * norm(part + bias), where `part` is already the sum over shards; it may be overwritten."""

    def __init__(self, bias: F32 | None = None, norm: Norm | None = None, scale: float = 1.0) -> None:
        self._bias, self._norm_after, self._scale = bias, norm, np.float32(scale)

    def __call__(self, x: F32, part: F32, threads: int = 1) -> None:
        if self._bias is not None:
            part += self._bias
        x += self._scale * self._norm(part, self._norm_after, threads)


class LayerStack:
    """Whole layers, whose keys and values lie in these pools: x [m, d] goes through attention and MLP of each.

    Layers may differ in their rope or in the KV blocks that they use: layer i uses rows[places[i]], or rows[0] if
    `places` is None. `between` is called before each layer, for work that must go on meanwhile.
    """

    def __init__(self, layers: Sequence[tuple[Attention, Residual, Mlp, Residual]], kv_type: BlockType,
                 pools: Sequence[tuple[Pool, ...]], places: Sequence[int] | None = None) -> None:  # fmt: skip
        self._layers = list(zip(layers, pools, [0] * len(layers) if places is None else places, strict=True))
        self._kv_type = kv_type

    def __call__(
        self, x: F32, rows: Sequence[Where], between: Callable[[], object], threads: int = 1
    ) -> None:
        part = np.empty_like(x)
        for (attention, after_attention, mlp, after_mlp), (kpool, vpool), place in self._layers:
            between()
            attention(x, *rows[place][:2], self._kv_type, kpool, vpool, *rows[place][2:], part, threads)
            after_attention(x, part, threads)
            mlp(x, part, threads)
            after_mlp(x, part, threads)
