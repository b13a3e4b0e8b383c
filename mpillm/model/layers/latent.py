"""Multi-head latent attention: what is kept of a token is a latent, which all heads share, and one rotated key.

Keys and values of the heads could be made of the latents (DeepSeek V2, arXiv 2405.04434, equation 10), or queries taken
into the space of the latents and outputs out of it. With R the latents' width, r that of the rotated key, n and v those
of a head's other key and of its value, and t earlier tokens, a row and a head take

- expanded: t (n + r + v) products, and R (n + v) for each of the t tokens whenever they are read again;
- absorbed: t (2 R + r) products, and R (n + v) once for the row.

DeepSeek V3 has R = 512, r = 64, n = v = 128. A row that decodes reads t (R + r) numbers either way, and expanded makes
131,072 products for each token beside 320: absorbed, 1,088. In a long prompt expanded latents serve many rows, and
absorbed costs 3.4 times as much in attention, which at 2,000 earlier tokens is half of what all other products of a
layer take. Two ways would give two roundings of the same token, and an answer would depend on how its prompt was cut;
so there is one, absorbed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpillm import kernels
from mpillm.kernels import adapted
from mpillm.model.batch import Turn
from mpillm.model.cache_spec import LayerCache, TokenCache
from mpillm.model.layers.attention import Rotary, attend
from mpillm.model.layers.mixer import MixerInput
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats
from mpillm.partition.grid import Axis, Place, axis
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class LatentAttentionSpec:
    """`n_heads` heads whose keys have `key_dim` dimensions beside the rotated ones, and whose values have `value_dim`.

    Latents are `kv_rank` wide, and normed by `kv_norm`. With a `q_rank` above 0 queries are of low rank, and normed by
    `q_norm` between the two matrices. `bias`: the matrices that make latents, and the output, have biases. Scores are
    multiplied by `scale`. Shards cut heads; what makes latents, and the latents, are whole on each.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    kv_rank: int
    scale: float
    rotary: Rotary
    kv_norm: NormSpec
    q_rank: int = 0
    q_norm: NormSpec | None = None
    bias: bool = False

    adaptable = ("q", "q_a", "q_b", "kv_a", "o")

    @property
    def fused(self) -> bool:
        """Whether its kernel may be part of a `kernels.LayerStack`."""
        return False

    @property
    def turn(self) -> Turn:
        """The RoPE of the attention."""
        return self.rotary.config, self.rotary.dim

    @property
    def o_bias(self) -> bool:
        """Whether its output has a bias."""
        return self.bias

    @property
    def n_kv_heads(self) -> int:
        """The number of heads of keys for the kernels: the latents are one head."""
        return 1

    @property
    def head_dim(self) -> int:
        """Numbers that are kept of a token: its latent and its rotated key."""
        return self.kv_rank + self.rotary.dim

    def heads(self, block: int) -> Axis:
        """Return the axis of heads, with the entries of their values."""
        return axis(self.n_heads, self.value_dim, block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards; `block`: block size of weights that are cut by columns."""
        return (self.heads(block),)

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of attention in a layer, in the order of a page."""
        values, rank, width = self.heads(block), self.kv_rank, self.key_dim + self.rotary.dim
        queries, latents = replace(values, width=width), replace(values, width=rank)
        if self.q_norm:
            yield TensorSpec(Key("q_a", layer), (self.q_rank, hidden))
            if self.bias:
                yield TensorSpec(Key("q_a_bias", layer), (self.q_rank,))
            yield from self.q_norm.tensors("q_a_norm", layer, self.q_rank)
            yield TensorSpec(Key("q_b", layer), (self.n_heads * width, self.q_rank), queries)
        else:
            yield TensorSpec(Key("q", layer), (self.n_heads * width, hidden), queries)
        yield TensorSpec(Key("kv_a", layer), (self.head_dim, hidden))
        if self.bias:
            yield TensorSpec(Key("kv_a_bias", layer), (self.head_dim,))
        yield from self.kv_norm.tensors("kv_a_norm", layer, rank)
        yield TensorSpec(Key("k_b", layer), (self.n_heads * rank, self.key_dim), latents, matrices=rank)
        yield TensorSpec(
            Key("v_b", layer), (self.n_heads * self.value_dim, rank), values, matrices=self.value_dim
        )
        yield TensorSpec(Key("o", layer), (hidden, self.n_heads * self.value_dim), cols=values)
        if self.bias:
            yield TensorSpec(Key("o_bias", layer), (hidden,))

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that a layer keeps on the rank at `place`: no values, which keys contain."""
        return (TokenCache(1, self.head_dim, 0),)

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: all that is between hidden states and attention's output.

        `copied` as in `AttentionSpec.row_nbytes`.
        """
        head = self.key_dim + self.rotary.dim + self.head_dim + self.kv_rank + self.value_dim
        heads = len(self.heads(block).units(place))
        widest = 4 * (heads * head + self.q_rank + self.head_dim)
        multiplied = hidden + self.q_rank + heads * (self.key_dim + self.kv_rank + self.value_dim)
        return widest + int(copied * multiplied)

    def compute(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        """Return the output of all shards for x [m, hidden], and the output's bias."""
        return attend(self, given)

    def kernel(
        self, page: Page, norm: kernels.Norm | None, place: Place, block: int
    ) -> kernels.LatentAttention:
        """Return the kernels' attention of a loaded page, whose memory it refers to; `norm` is that of its input."""
        low = self.q_norm is not None
        attention = adapted.AdaptedLatentAttention if page.adapted else kernels.LatentAttention
        return attention(
            page.matrix("q_b" if low else "q"),
            page.matrix("kv_a"),
            page.matrices("k_b"),
            page.matrices("v_b"),
            page.matrix("o"),
            self.scale,
            kv_norm=self.kv_norm.kernel(page, "kv_a_norm"),
            q_a=page.matrix("q_a") if low else None,
            q_norm=self.q_norm.kernel(page, "q_a_norm") if self.q_norm else None,
            norm=norm,
            biases=(page.vector("q_a_bias") if low else None, page.vector("kv_a_bias"))
            if self.bias
            else None,
            interleaved=self.rotary.interleaved,
        )
