"""Simulate KV caches of 4 bits: how much they change the answers of a small Llama model (no test: it takes minutes).

    python -m tests.model.kv_forms smollm2-135m LICENSE docs/memory.md ... --tokens 1024

Each text is one sequence. For each form it prints the mean change of a token's negative log-likelihood, its standard
error over the texts, the Kullback-Leibler divergence from the model's own probabilities (which varies less), and the
bits of a stored value. The first tokens of a text are always in Q8_0. "Measured" forms have constants of the model
(`kv_measured`), from the texts that --measure names.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mpillm.catalogue.models import resolve
from mpillm.model.opening import open_source
from mpillm.text import load_tokenizer
from tests.model.kv_measured import Coded, Measured, rotated_on_trellis

F32 = NDArray[np.float32]
BLOCK = 32
# Dimensions of keys by pair, from the pairs that count most on, and their bits (4.625 with a byte for a row's scale).
PAIRS = ((16, 6), (48, 4))


def by_pair(x: F32) -> F32:
    """Replace both dimensions of each pair of RoPE by their mean."""
    return np.repeat(x.reshape(*x.shape[:-1], -1, 2).mean(-1), 2, -1)


def q8_0(x: F32) -> F32:
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    return (np.rint(blocks / np.maximum(scale, 1e-12)) * scale).reshape(x.shape)


def rope(x: F32, positions: NDArray[np.int64], base: float) -> F32:
    angles = positions[:, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def keys_by_pair(k: F32, base: float) -> F32:
    """Keys [heads, tokens, dim] on a trellis, whose bits go to the pairs of RoPE that count most.

    The constants of a head come from its first block as it is stored, less the first token: the mean before RoPE, which
    is rotated to each position and taken off, and the variance of each pair. A pair counts as its variance times the
    mean square of the queries, which is about the geometric mean of the keys' variance and squared mean.
    """
    positions, first = np.arange(k.shape[1]), q8_0(k[:, :BLOCK])
    mean = rope(first, -positions[:BLOCK], base)[:, 1:].mean(1, keepdims=True)
    constant = rope(np.broadcast_to(mean, k.shape), positions, base)
    variance = by_pair(((first - constant[:, :BLOCK])[:, 1:] ** 2).mean(1)) + 1e-6
    queries = np.sqrt(by_pair(mean[:, 0] ** 2) * variance)
    found = [
        Coded(*(np.diag(x.astype(np.float64)) for x in (own, of_queries)), PAIRS).stored(rows)
        for rows, own, of_queries in zip(k - constant, variance, queries, strict=True)
    ]
    return np.stack(found) + constant


Stored = Callable[
    [int, F32], F32
]  # the layer; keys after RoPE or values [kv heads, tokens, dim]; what is read back
Form = tuple[Stored | None, Stored | None, float, float]  # of keys and values, and their bits
NAMES = (
    "Q8_0",
    "values rotated",
    "keys by pair",
    "keys by pair, values rotated",
    "keys measured",
    "keys and values measured",
)


def forms(base: float, measured: Measured) -> dict[str, Form]:
    def all_q8(_: int, x: F32) -> F32:
        return q8_0(x)

    def turned(_: int, x: F32) -> F32:
        return rotated_on_trellis(x)

    def pairs(_: int, k: F32) -> F32:
        return keys_by_pair(k, base)

    found: list[Form] = [
        (all_q8, all_q8, 8.5, 8.5),
        (None, turned, 32, 4.125),
        (pairs, None, 4.625, 32),
        (pairs, turned, 4.625, 4.125),
        (measured.keys, None, 4.375, 32),
        (measured.keys, measured.values, 4.375, 4.375),
    ]
    return dict(zip(NAMES, found, strict=True))


class Llama:
    """A Llama model of a GGUF file, in float32."""

    def __init__(self, path: Path, first: int) -> None:
        self.first = first  # tokens that a cache has in Q8_0
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

    def log_probs(
        self,
        ids: NDArray[np.int64],
        keys: Stored | None,
        values: Stored | None,
        measured: Measured | None = None,
    ) -> F32:
        """Log-probabilities of the tokens after each of `ids`, with keys and values as a cache stores them.

        What attention reads is added to `measured`.
        """
        x = self.weights["token_embd.weight"][ids]
        for layer in range(self._field("block_count")):
            name = f"blk.{layer}"
            q, k, v, output, gate, up, down = (
                self.weights[f"{name}.{part}.weight"].T
                for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
            )
            h = self._norm(x, f"{name}.attn_norm")
            q, k, v = self._heads(h @ q, h @ k, h @ v)
            if measured:
                measured.add(layer, q, k, v, output)
            if keys:
                k = self._with_first(k, keys(layer, k))
            if values:
                v = self._with_first(v, values(layer, v))
            x = x + self._attention(q, k, v) @ output
            h = self._norm(x, f"{name}.ffn_norm")
            gated = h @ gate
            x = x + (gated / (1 + np.exp(-gated)) * (h @ up)) @ down
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        logits = self._norm(x, "output_norm") @ head.T
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return logits

    def _with_first(self, x: F32, stored: F32) -> F32:
        return np.concatenate((q8_0(x[:, : self.first]), stored[:, self.first :]), 1)

    def _heads(self, q: F32, k: F32, v: F32) -> list[F32]:
        """Queries and keys after RoPE, and values: [heads, tokens, dim]."""
        tokens = len(q)
        q, k, v = (
            x.reshape(tokens, heads, -1).swapaxes(0, 1)
            for x, heads in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))
        )
        return [*(rope(x, np.arange(tokens), self.base) for x in (q, k)), v]

    def _attention(self, q: F32, k: F32, v: F32) -> F32:
        tokens = q.shape[1]
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
    parser.add_argument("--first", type=int, default=BLOCK, help="tokens at the beginning that are in Q8_0")
    parser.add_argument("--form", action="append", choices=NAMES, help="all of them if none is named")
    parser.add_argument(
        "--measure",
        type=Path,
        nargs="+",
        default=[],
        metavar="TEXT",
        help="texts for the constants of a model",
    )
    args = parser.parse_args()
    path = resolve(args.model)
    with closing(open_source(path)) as source:
        tokenizer = load_tokenizer(source.tokenizer)
    assert tokenizer is not None, "the file has no tokenizer"
    model = Llama(path, args.first)
    measured = Measured(lambda x, positions: rope(x, positions, model.base))

    def ids_of(path: Path) -> NDArray[np.int64]:
        return np.array(tokenizer.encode(path.read_text(errors="replace"))[: args.tokens])

    for path in args.measure:
        model.log_probs(ids_of(path), None, None, measured)
    possible = [name for name in NAMES if args.measure or "measured" not in name]
    names, found, table = args.form or possible, [], forms(model.base, measured)
    if unknown := [name for name in names if name not in possible]:
        parser.error(f"--form {unknown[0]!r} needs --measure TEXT")
    for path in args.texts:
        ids = ids_of(path)
        own, of_text = model.log_probs(ids, None, None)[:-1], []
        for name in names:
            difference = own - model.log_probs(ids, *table[name][:2])[:-1]
            change = difference[np.arange(len(ids) - 1), ids[1:]].mean()
            of_text.append((change, (np.exp(own) * difference).sum(-1).mean()))
        found.append(of_text)
        print(f"{path}: {len(ids)} tokens", flush=True)
    print(f"{'form':32}{'bits of keys, values':>22}{'perplexity':>22}{'divergence':>12}")
    for name, of_form in zip(names, np.array(found).swapaxes(0, 1), strict=True):
        bits = f"{table[name][2]}, {table[name][3]}"
        error = of_form[:, 0].std(ddof=1) / math.sqrt(len(of_form)) if len(of_form) > 1 else math.nan
        change = f"{math.expm1(of_form[:, 0].mean()):+.2%} +- {error:.2%}"
        print(f"{name:32}{bits:>22}{change:>22}{of_form[:, 1].mean():>12.5f}")


if __name__ == "__main__":
    main()
