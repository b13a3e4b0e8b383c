"""Simulate KV caches of 4 bits: how much they change the answers of a small Llama model (no test: it takes minutes).

    python -m tests.model.kv_forms smollm2-135m LICENSE docs/memory.md ... --tokens 1024

Each text is one sequence. For each form it prints the mean change of a token's negative log-likelihood, its standard
error over the texts, the Kullback-Leibler divergence from the model's own probabilities (which varies less), and the
bits of a stored value. The first block of 32 tokens is always in Q8_0.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mpillm.catalogue.models import resolve
from mpillm.model.opening import open_source
from mpillm.text import load_tokenizer

F32 = NDArray[np.float32]
BLOCK = 32
# Pairs from the one that counts most on, their bits, and how many of their dimensions are rotated together (0: none; a
# constant range). For heads of 64 dimensions: 4.5 bits.
CLASSES = ((2, 8, 0), (2, 6, 4), (4, 5, 8), (24, 4, 16))
WIDE_RANGE = 16.0


@functools.cache
def best_levels(count: int) -> F32:
    """The levels with the least squared error for a normal distribution (Lloyd's algorithm)."""
    x = np.linspace(-8, 8, 64001)
    weight = np.exp(-x * x / 2)
    mass, moment = (np.concatenate(([0], np.cumsum(y))) for y in (weight, weight * x))
    levels = np.array([NormalDist(0, math.sqrt(3)).inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(500):
        edges = np.concatenate(([0], np.searchsorted(x, (levels[1:] + levels[:-1]) / 2), [len(x)]))
        levels = np.diff(moment[edges]) / np.diff(mass[edges])
    return levels.astype(np.float32)


@functools.cache
def hadamard(n: int) -> F32:
    """An orthogonal matrix of n rows, a power of two, that is its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(n)).astype(np.float32)


def by_pair(x: F32) -> F32:
    """Replace both dimensions of each pair of RoPE by their mean."""
    return np.repeat(x.reshape(*x.shape[:-1], -1, 2).mean(-1), 2, -1)


def q8_0(x: F32) -> F32:
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    return (np.rint(blocks / np.maximum(scale, 1e-12)) * scale).reshape(x.shape)


def best_of_row(parts: list[F32], counts: list[int]) -> list[F32]:
    """The best levels of each part, with one scale for each row of all of them, by least squares.

    A scale takes one byte: it is a power of 2^(1/32).
    """
    power = sum((x * x).sum(-1, keepdims=True) for x in parts)
    scale = np.sqrt(power / sum(x.shape[-1] for x in parts)) + 1e-9
    for _ in range(2):
        found = [_nearest(x / scale, count) for x, count in zip(parts, counts, strict=True)]
        product = sum((x * y).sum(-1, keepdims=True) for x, y in zip(parts, found, strict=True))
        scale = np.maximum(product, 1e-9) / sum((y * y).sum(-1, keepdims=True) for y in found)
    scale = np.exp2(np.rint(np.log2(scale) * 32) / 32)
    return [_nearest(x / scale, count) * scale for x, count in zip(parts, counts, strict=True)]


def _nearest(x: F32, count: int) -> F32:
    levels = best_levels(count)
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def rotated(x: F32) -> F32:
    """Rotate a head's dimensions, then the best 16 levels: 4 bits, and a byte for the scale of a head and token."""
    matrix = hadamard(x.shape[-1])
    return best_of_row([x @ matrix], [16])[0] @ matrix


def rope(x: F32, positions: NDArray[np.int64], base: float) -> F32:
    angles = positions[:, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def wide_levels(x: F32, bits: int) -> F32:
    """Levels of 16 deviations on each side, the squares of equal steps: those near zero are the densest."""
    half = 1 << (bits - 1)
    nearest = np.floor(np.sqrt(np.abs(x) / WIDE_RANGE) * half) + np.arange(-0.5, 2)[:, None, None]
    levels = WIDE_RANGE * (np.clip(nearest, 0.5, half - 0.5) / half) ** 2
    best = np.abs(levels - np.abs(x)).argmin(0)
    return np.copysign(np.take_along_axis(levels, best[None], 0)[0], x).astype(np.float32)


def keys_by_pair(k: F32, base: float) -> F32:
    """Keys [heads, tokens, dim] whose bits go to the pairs of RoPE that count most.

    The constants of a head come from its first block as it is stored, less the first token: the mean before RoPE, which
    is rotated to each position and taken off, and the deviation of each pair. A pair counts as its variance times the
    mean square of the queries, which is about the geometric mean of the keys' variance and squared mean.
    """
    positions, first = np.arange(k.shape[1]), q8_0(k[:, :BLOCK])
    mean = rope(first, -positions[:BLOCK], base)[:, 1:].mean(1, keepdims=True)
    constant = rope(np.broadcast_to(mean, k.shape), positions, base)
    variance = by_pair(((first - constant[:, :BLOCK])[:, 1:] ** 2).mean(1)) + 1e-6
    queries = np.sqrt(by_pair(mean[:, 0] ** 2) * variance)
    return np.stack([_head(*each) for each in zip(k - constant, variance, queries, strict=True)]) + constant


def _head(x: F32, variance: F32, queries: F32) -> F32:
    order = np.argsort(-(variance * queries)[::2], kind="stable")
    dims = np.stack((2 * order, 2 * order + 1), -1).ravel()
    out, turned, places, begin = np.empty_like(x), [], [], 0
    for pairs, bits, group in CLASSES:
        of = dims[begin : begin + 2 * pairs]
        begin += 2 * pairs
        if not group:
            out[:, of] = wide_levels(x[:, of] / np.sqrt(variance[of]), bits) * np.sqrt(variance[of])
            continue
        of = of.reshape(group, -1).T  # a group has pairs of all weights
        gain = (queries[of] / variance[of]) ** 0.25
        gain /= np.sqrt((variance[of] * gain**2).mean())
        turned.append(((x[:, of] * gain) @ hadamard(group)).reshape(len(x), -1))
        places.append((of, gain, bits))
    stored = best_of_row(turned, [1 << bits for _, _, bits in places])
    for y, (of, gain, _) in zip(stored, places, strict=True):
        out[:, of] = (y.reshape(len(x), *of.shape) @ hadamard(of.shape[1])) / gain
    return out


Keys = Callable[[F32, float], F32]
Values = Callable[[F32], F32]
FORMS: dict[str, tuple[Keys | None, Values | None, float, float]] = {  # of keys and values, and their bits
    "Q8_0": (lambda k, base: q8_0(k), q8_0, 8.5, 8.5),
    "values rotated": (None, rotated, 32, 4.125),
    "keys and values rotated": (lambda k, base: rotated(k), rotated, 4.125, 4.125),
    "keys by pair": (keys_by_pair, None, 4.625, 32),
    "keys by pair, values rotated": (keys_by_pair, rotated, 4.625, 4.125),
}


class Llama:
    """A Llama model of a GGUF file, in float32."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {
            t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
        }
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.heads, self.kv_heads = (self._field(f"attention.head_count{kind}") for kind in ("", "_kv"))
        self.base, self.epsilon = (
            self._field("rope.freq_base"),
            self._field("attention.layer_norm_rms_epsilon"),
        )

    def _field(self, name: str) -> Any:
        return self.fields[f"llama.{name}"]

    def _norm(self, x: F32, name: str) -> F32:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights[f"{name}.weight"]

    def log_probs(self, ids: NDArray[np.int64], keys: Keys | None, values: Values | None) -> F32:
        """Log-probabilities of the tokens after each of `ids`, with keys and values as a cache stores them."""
        x = self.weights["token_embd.weight"][ids]
        for layer in range(self._field("block_count")):
            name = f"blk.{layer}"
            q, k, v, output, gate, up, down = (
                self.weights[f"{name}.{part}.weight"].T
                for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
            )
            h = self._norm(x, f"{name}.attn_norm")
            x = x + self._attention(h @ q, h @ k, h @ v, keys, values) @ output
            h = self._norm(x, f"{name}.ffn_norm")
            gated = h @ gate
            x = x + (gated / (1 + np.exp(-gated)) * (h @ up)) @ down
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        logits = self._norm(x, "output_norm") @ head.T
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits

    def _attention(self, q: F32, k: F32, v: F32, keys: Keys | None, values: Values | None) -> F32:
        tokens = len(q)
        q, k, v = (
            x.reshape(tokens, heads, -1).swapaxes(0, 1)
            for x, heads in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))
        )
        q, k = (rope(x, np.arange(tokens), self.base) for x in (q, k))
        k = np.concatenate((q8_0(k[:, :BLOCK]), keys(k, self.base)[:, BLOCK:]), 1) if keys else k
        v = np.concatenate((q8_0(v[:, :BLOCK]), values(v)[:, BLOCK:]), 1) if values else v
        out, later = np.empty_like(q), np.triu(np.ones((tokens, tokens), bool), 1)
        for head in range(self.heads):
            of = head * self.kv_heads // self.heads
            scores = q[head] @ k[of].T / np.float32(math.sqrt(q.shape[-1]))
            scores[later] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out[head] = scores / scores.sum(-1, keepdims=True) @ v[of]
        return out.swapaxes(0, 1).reshape(tokens, -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.model.kv_forms", description="Simulate KV caches of 4 bits."
    )
    parser.add_argument("model", help="a GGUF file of a Llama model with heads of 64 dimensions, or its name")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each text that are used")
    parser.add_argument("--form", action="append", choices=FORMS, help="all of them if none is named")
    args = parser.parse_args()
    path = resolve(args.model)
    with closing(open_source(path)) as source:
        tokenizer = load_tokenizer(source.tokenizer)
    assert tokenizer is not None, "the file has no tokenizer"
    model = Llama(path)
    names, found = args.form or list(FORMS), []
    for path in args.texts:
        ids = np.array(tokenizer.encode(path.read_text(errors="replace"))[: args.tokens])
        own, of_text = model.log_probs(ids, None, None)[:-1], []
        for name in names:
            difference = own - model.log_probs(ids, *FORMS[name][:2])[:-1]
            change = difference[np.arange(len(ids) - 1), ids[1:]].mean()
            of_text.append((change, (np.exp(own) * difference).sum(-1).mean()))
        found.append(of_text)
        print(f"{path}: {len(ids)} tokens", flush=True)
    print(f"{'form':32}{'bits of keys, values':>22}{'perplexity':>22}{'divergence':>12}")
    for name, of_form in zip(names, np.array(found).swapaxes(0, 1), strict=True):
        bits = f"{FORMS[name][2]}, {FORMS[name][3]}"
        error = of_form[:, 0].std(ddof=1) / math.sqrt(len(of_form)) if len(of_form) > 1 else math.nan
        change = f"{math.expm1(of_form[:, 0].mean()):+.2%} +- {error:.2%}"
        print(f"{name:32}{bits:>22}{change:>22}{of_form[:, 1].mean():>12.5f}")


if __name__ == "__main__":
    main()
