"""The reply of the last stage to a step: candidates and normalisers of some rows instead of logits.

Each shard of the last stage replies for its part of the vocabulary. For every output of the step, in order, a reply
holds the k likeliest ids (fewer if the part is smaller), their adjusted logits and the model's logits, the sums of each
vocabulary panel for the two normalisers, and the logit of the target if the shard owns it. Shard 0 adds the final
hidden states that embeddings are pooled from. If a logit is NaN or infinite, the output's candidates are meaningless
and its sums are NaN.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.engine import exact
from mpillm.engine.messages import Fetch
from mpillm.engine.sampler import FORBIDDEN, Candidates, weights_of
from mpillm.engine.step import Chunk, Output, Step
from mpillm.model.decoder import Decoder

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

HEADER = struct.Struct("<4I")  # step, outputs, candidates, hidden rows
SUMS = 4  # per panel: maximum raw logit, sum of exp(raw - maximum), maximum value, sum of exp((value - maximum) / T)
TILE = 64  # outputs whose logits are in memory at once


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply of one shard. Flat arrays hold the candidates of output 0, then those of output 1, and so on."""

    step: int
    ids: NDArray[np.int32]
    values: Floats
    raw: Floats
    panel_sums: Floats  # [outputs, own panels, SUMS]
    targets: Floats  # [outputs], NaN if an output has no target or another shard owns it
    hidden: Floats  # [hidden rows, d]

    def encode(self) -> bytes:
        """Return the reply as a message."""
        head = HEADER.pack(self.step, len(self.targets), len(self.ids), len(self.hidden))
        arrays = (self.ids, self.values, self.raw, self.panel_sums, self.targets, self.hidden)
        return head + b"".join(array.tobytes() for array in arrays)

    @staticmethod
    def decode(message: bytes, width: int) -> Reply:
        """Return the reply in a message; `width` is the model's hidden size, for replies with hidden states."""
        if len(message) < HEADER.size or len(message) % 4:
            raise ValueError(f"a reply of {len(message)} bytes is shorter than its header, or no whole words")
        step, outputs, candidates, rows = HEADER.unpack_from(message)
        words = np.frombuffer(message, "<f4", offset=HEADER.size)
        sizes = [candidates, candidates, candidates, None, outputs, rows * width]
        panels = len(words) - sum(size for size in sizes if size is not None)
        if panels < 0 or (panels % (outputs * SUMS) if outputs else panels):
            raise ValueError(f"a reply of {len(message)} bytes does not match its header")
        ends = np.cumsum([panels if size is None else size for size in sizes])
        ids, values, raw, panel_sums, targets, hidden = np.split(words, ends[:-1])
        shape = (outputs, -1, SUMS) if outputs else (0, 0, SUMS)
        return Reply(
            step,
            ids.view("<i4"),
            values,
            raw,
            panel_sums.reshape(shape),
            targets,
            hidden.reshape(rows, width),
        )


class ReplyBuilder:
    """Makes the replies of a last-stage rank, and keeps sampled rows while more candidates may be fetched.

    It keeps the inputs of the LM head; the logits may be a hundred times as large.
    """

    def __init__(self, decoder: Decoder, keep_steps: int, threads: int) -> None:
        self._decoder = decoder
        self._keep_steps = keep_steps
        self._threads = threads
        self._kept: dict[int, tuple[Step, dict[int, Floats]]] = {}

    def build(self, step: Step, x: Floats) -> Reply:
        """Return the reply to a step; `x` [m, d] is the output of the last layer."""
        outputs, hidden_rows = step.outputs, step.hidden_rows()
        kept: dict[int, Floats] = {}
        pieces = []
        for begin in range(0, len(outputs), TILE):
            tile = outputs[begin : begin + TILE]
            rows = np.array([output.row for output in tile])
            normed = self._decoder.final_norm(x[rows])
            kept.update({begin + i: normed[i] for i, output in enumerate(tile) if output.sampled})
            pieces.append(self._candidates(step, tile, self._decoder.logits(normed)))
        hidden = np.empty((0, x.shape[1]), np.float32)
        if len(hidden_rows) and self._decoder.place.shard == 0:
            hidden = self._decoder.final_norm(x[hidden_rows])
        self._kept[step.number] = step, kept
        for number in [number for number in self._kept if number <= step.number - self._keep_steps]:
            del self._kept[number]
        return self._join(step.number, pieces, hidden)

    def fetch(self, fetch: Fetch) -> Reply:
        """Return the reply to a request for more candidates of a recent step."""
        step, kept = self._kept[fetch.number]
        outputs = [step.outputs[i]._replace(k=fetch.k) for i in fetch.outputs]
        rows = [kept[i] for i in fetch.outputs]
        pieces = [
            self._candidates(step, outputs[i : i + TILE], self._decoder.logits(np.stack(rows[i : i + TILE])))
            for i in range(0, len(outputs), TILE)
        ]
        return self._join(fetch.number, pieces, np.empty((0, 0), np.float32))

    def _candidates(
        self, step: Step, outputs: Seq[Output], logits: Floats
    ) -> tuple[NDArray[np.generic], ...]:
        vocab, threads = self._decoder.vocab, self._threads
        broken = rows_not_finite(logits, threads)
        if broken:
            logits[broken] = 0.0  # keeps the arithmetic below defined; no token is drawn from these rows
        values = logits
        if any(output.adjusted for output in outputs):
            values = logits.copy()
            for row, output in zip(values, outputs, strict=True):
                if output.adjusted:
                    _adjust(row, step.chunks[output.chunk], vocab)
        wanted = [output.k for output in outputs]
        k = min(max(wanted), len(vocab)) or 1
        top, ids = np.empty((len(outputs), k), np.float32), np.empty((len(outputs), k), np.int32)
        kernels.top_k(values, k, top, ids, threads)
        raw = top if values is logits else np.take_along_axis(logits, ids, axis=1)
        ids += np.int32(vocab.start)
        panel_sums = self._normalisers(outputs, logits, values)
        if broken:
            panel_sums[broken] = np.nan
        targets = self._targets(outputs, logits)
        if min(wanted) >= k:
            return ids.ravel(), top.ravel(), raw.ravel(), panel_sums, targets
        mask = np.arange(k) < np.array(wanted)[:, None]
        return ids[mask], top[mask], raw[mask], panel_sums, targets

    def _targets(self, outputs: Seq[Output], logits: Floats) -> Floats:
        """Return the targets' logits [outputs]: NaN if there is no target or another shard owns it."""
        vocab = self._decoder.vocab
        found = np.full(len(outputs), np.nan, np.float32)
        for row, output in enumerate(outputs):
            if output.target in vocab:  # NO_TARGET is in no part of the vocabulary
                found[row] = logits[row, output.target - vocab.start]
        return found

    def _normalisers(self, outputs: Seq[Output], logits: Floats, values: Floats) -> Floats:
        """Return the panels' sums for the normalisers [outputs, own panels, SUMS]; zeros if no output needs them."""
        bounds, threads = self._decoder.vocab_bounds, self._threads
        if not any(output.normalised for output in outputs):
            return np.zeros((len(outputs), len(bounds) - 1, SUMS), np.float32)
        inv_t = np.array([output.inv_t for output in outputs], np.float32)
        sums = np.empty((2, len(outputs), len(bounds) - 1, 3), np.float32)
        kernels.lse_parts(logits, inv_t, bounds, sums[0], threads)
        if values is logits:
            sums[1] = sums[0]
        else:
            kernels.lse_parts(values, inv_t, bounds, sums[1], threads)
        return np.concatenate([sums[0, :, :, :2], sums[1, :, :, ::2]], axis=2)

    def _join(self, number: int, pieces: list[tuple[NDArray[np.generic], ...]], hidden: Floats) -> Reply:
        if not pieces:
            none = np.empty(0, np.float32)
            pieces = [(none.view(np.int32), none, none, np.empty((0, 0, SUMS), np.float32), none)]
        columns: Iterable[Any] = pieces[0]
        if len(pieces) > 1:
            columns = map(np.concatenate, zip(*pieces, strict=True))
        ids, values, raw, panel_sums, targets = columns
        return Reply(number, ids, values, raw, panel_sums, targets, hidden)


def rows_not_finite(rows: Floats, threads: int) -> list[int]:
    """Return the rows of an array [m, n] that contain NaN or infinity.

    A sum of squares finds them without a copy; if it is not finite, it may have overflowed, and the values are checked.
    """
    sums = np.empty(len(rows), np.float32)
    kernels.square_sums(rows, sums, threads)
    return [
        row
        for row, total in enumerate(sums.tolist())
        if not math.isfinite(total) and not np.isfinite(rows[row]).all()
    ]


def _adjust(row: Floats, chunk: Chunk, vocab: range) -> None:
    """Adjust a row of logits before sampling, in vLLM's order: masks, shifts, penalties.

    The repetition penalty is that of CTRL (Keskar et al. 2019, section 4.1) as in transformers: it multiplies negative
    logits and divides positive ones.
    """
    if len(chunk.allowed):
        bits = np.unpackbits(chunk.allowed.view(np.uint8), bitorder="little")[vocab.start : vocab.stop]
        row[bits == 0] = FORBIDDEN
    shifts = chunk.shifts
    chosen = (shifts.ids >= vocab.start) & (shifts.ids < vocab.stop)
    shifted = shifts.ids[chosen] - vocab.start
    row[shifted] += shifts.before[chosen]
    if chunk.penalty != 1.0:
        own = chunk.seen[(chunk.seen >= vocab.start) & (chunk.seen < vocab.stop)] - vocab.start
        penalty = np.float32(chunk.penalty)
        row[own] = np.where(row[own] > 0, row[own] / penalty, row[own] * penalty)
    row[shifted] += shifts.after[chosen]


def merge(replies: Seq[Reply], outputs: Seq[Output], shard_sizes: Seq[int]) -> list[Candidates]:
    """Merge the shards' replies into one `Candidates` for each output; `shard_sizes` are in vocabulary rows."""
    if not outputs:
        return []
    wanted, vocab = [output.k for output in outputs], sum(shard_sizes)
    counts = [[min(k, size) for k in wanted] for size in shard_sizes]
    for shard, (reply, count) in enumerate(zip(replies, counts, strict=True)):
        if len(reply.targets) != len(outputs) or len(reply.ids) != sum(count):
            raise ValueError(
                f"shard {shard} replied {len(reply.ids)} candidates of {len(reply.targets)} outputs where "
                f"{sum(count)} of {len(outputs)} were asked for"
            )
    first_sums = [reply.panel_sums[:, 0, 0] for reply in replies]
    broken = np.isnan(reduce(np.maximum, first_sums)).tolist()  # np.maximum propagates NaN
    if any(broken):
        replies = [replace(reply, panel_sums=np.nan_to_num(reply.panel_sums, nan=1.0)) for reply in replies]
    ids, values, raw = (
        _tables([getattr(reply, name) for reply in replies], counts) for name in ("ids", "values", "raw")
    )
    if len(replies) > 1:
        order = np.lexsort((ids, -values), axis=-1)
        ids, values, raw = (np.take_along_axis(table, order, axis=1) for table in (ids, values, raw))
    drawn = [i for i, output in enumerate(outputs) if output.sampled and output.normalised]
    weights = dict.fromkeys(range(len(outputs)), _NONE)
    if drawn:
        inv_t = np.array([outputs[i].inv_t for i in drawn])
        weights.update(zip(drawn, weights_of(values[drawn], inv_t), strict=True))
    log_z, scaled_z = _normalisers(replies, outputs)
    targets = reduce(np.fmax, [reply.targets for reply in replies]).tolist()
    return [
        Candidates(
            ids[i, :k],
            values[i, :k],
            raw[i, :k],
            weights[i][:k],
            log_z[i],
            scaled_z[i],
            k == vocab,
            targets[i],
            not broken[i],
        )
        for i, k in enumerate(min(k, vocab) for k in wanted)
    ]


_NONE = np.empty(0, np.float32)


def _tables(flat: Seq[NDArray[Any]], counts: Seq[list[int]]) -> NDArray[Any]:
    """Return the values of all shards as one row for each output, padded with -inf (or the lowest integer)."""
    tables = []
    for values, count in zip(flat, counts, strict=True):
        width = max(count)
        if len(values) == width * len(count):
            tables.append(values.reshape(len(count), width))
            continue
        lowest = -np.inf if values.dtype.kind == "f" else np.iinfo(np.int32).min
        table = np.full((len(count), width), lowest, values.dtype)
        table[np.arange(width) < np.array(count)[:, None]] = values
        tables.append(table)
    return tables[0] if len(tables) == 1 else np.concatenate(tables, axis=1)


def _normalisers(replies: Seq[Reply], outputs: Seq[Output]) -> tuple[list[float], list[float]]:
    """Return `log_z` and `scaled_z` of each output, from the sums of all vocabulary panels in order."""
    at = [i for i, output in enumerate(outputs) if output.normalised]
    if not at:
        return [np.nan] * len(outputs), [np.nan] * len(outputs)
    log_z, scaled_z = np.full((2, len(outputs)), np.nan)
    panel_sums = np.concatenate([reply.panel_sums for reply in replies], axis=1)[at].astype(np.float64)
    raw_maximum, raw_total = _total(panel_sums[:, :, 0], panel_sums[:, :, 1], np.ones(len(at)))
    log_z[at] = raw_maximum + exact.log(raw_total)
    inv_t = np.array([outputs[i].inv_t for i in at])
    _, scaled_z[at] = _total(panel_sums[:, :, 2], panel_sums[:, :, 3], inv_t)
    return log_z.tolist(), scaled_z.tolist()


def _total(maxima: Doubles, sums: Doubles, inv_t: Doubles) -> tuple[Doubles, Doubles]:
    """Combine the panels' maxima and relative sums [n, panels], in order, to maxima [n] and relative sums [n]."""
    maximum = maxima.max(axis=1)
    terms = sums * exact.exp((maxima - maximum[:, None]) * inv_t[:, None])
    return maximum, np.cumsum(terms, axis=1)[:, -1]
