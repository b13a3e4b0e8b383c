"""What the last stage answers to a step: candidates and normalisers of the rows asked for, not logits.

Each shard of the last stage answers for its part of the vocabulary. For every output of the step, in order, a
reply holds its k likeliest ids (fewer if its part is smaller), their logits as they decide and as the model gave
them, per vocabulary panel the parts of the two normalisers, and the logit of the target if the shard owns it.
Shard 0 adds the final hidden states that embeddings are pooled from.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.engine.sampler import Candidates
from mpillm.engine.step import NO_TARGET, Fetch, Output, Part, Step
from mpillm.model.decoder import Decoder

Floats = NDArray[np.float32]

HEADER = struct.Struct("<4I")  # step, outputs, candidates, hidden rows
PARTS = 4  # per panel: greatest raw logit, sum of exp(raw - it), greatest value, sum of exp((value - it) / T)
TILE = 64  # outputs whose logits are held at once while scoring


@dataclass(frozen=True, slots=True)
class Reply:
    """One shard's answer; `counts[i]` candidates of output i lie one after the other in the flat arrays."""

    step: int
    ids: NDArray[np.int32]
    values: Floats
    raw: Floats
    parts: Floats  # [outputs, own panels, PARTS]
    targets: Floats  # [outputs], NaN where there is none or another shard owns it
    hidden: Floats  # [hidden rows, d]

    def encode(self) -> bytes:
        """The message."""
        head = HEADER.pack(self.step, len(self.targets), len(self.ids), len(self.hidden))
        arrays = (self.ids, self.values, self.raw, self.parts, self.targets, self.hidden)
        return head + b"".join(array.tobytes() for array in arrays)

    @staticmethod
    def decode(message: bytes, width: int) -> Reply:
        """The reply of a message; `width` is the model's hidden size, for replies that carry hidden states."""
        step, outputs, candidates, rows = HEADER.unpack_from(message)
        words = np.frombuffer(message, "<f4", offset=HEADER.size)
        sizes = [candidates, candidates, candidates, None, outputs, rows * width]
        panels = len(words) - sum(size for size in sizes if size is not None)
        if panels < 0 or (panels % (outputs * PARTS) if outputs else panels):
            raise ValueError(f"a reply of {len(message)} bytes does not match its header")
        ends = np.cumsum([panels if size is None else size for size in sizes])
        ids, values, raw, parts, targets, hidden = np.split(words, ends[:-1])
        shape = (outputs, -1, PARTS) if outputs else (0, 0, PARTS)
        return Reply(
            step, ids.view("<i4"), values, raw, parts.reshape(shape), targets, hidden.reshape(rows, width)
        )


class Answerer:
    """Makes a last-stage rank's replies, and keeps the logits of drawn rows until they cannot be asked for again."""

    def __init__(self, decoder: Decoder, keep_steps: int, threads: int) -> None:
        self._decoder = decoder
        self._keep_steps = keep_steps
        self._threads = threads
        self._kept: dict[int, tuple[Step, dict[int, Floats]]] = {}

    def answer(self, step: Step, x: Floats) -> Reply:
        """Answer a step whose rows left the last layer as `x` [m, d]."""
        outputs, hidden_rows = step.outputs(), step.hidden_rows()
        kept: dict[int, Floats] = {}
        pieces = []
        for begin in range(0, len(outputs), TILE):
            tile = outputs[begin : begin + TILE]
            rows = np.array([output.row for output in tile])
            logits = self._decoder.logits(self._decoder.final_norm(x[rows]))
            kept.update({begin + i: logits[i] for i, output in enumerate(tile) if output.sampled})
            pieces.append(self._candidates(step, tile, logits))
        hidden = np.empty((0, x.shape[1]), np.float32)
        if len(hidden_rows) and self._decoder.place.shard == 0:
            hidden = self._decoder.final_norm(x[hidden_rows])
        self._kept[step.number] = step, kept
        for number in [number for number in self._kept if number <= step.number - self._keep_steps]:
            del self._kept[number]
        return self._join(step.number, pieces, hidden)

    def fetch(self, fetch: Fetch) -> Reply:
        """Answer a request for more candidates of a recent step."""
        step, kept = self._kept[fetch.number]
        outputs = step.outputs()
        pieces = [
            self._candidates(step, [outputs[i]._replace(k=fetch.k)], kept[i][None]) for i in fetch.outputs
        ]
        return self._join(step.number, pieces, np.empty((0, 0), np.float32))

    def _candidates(
        self, step: Step, outputs: Seq[Output], logits: Floats
    ) -> tuple[NDArray[np.generic], ...]:
        vocab, bounds, threads = self._decoder.vocab, self._decoder.vocab_bounds, self._threads
        inv_t = np.array([output.inv_t for output in outputs], np.float32)
        values = logits
        if any(output.penalised for output in outputs):
            values = logits.copy()
            for row, output in zip(values, outputs, strict=True):
                if output.penalised:
                    _penalise(row, step.parts[output.part], vocab)
        k = min(max(output.k for output in outputs), len(vocab)) or 1
        top, ids = np.empty((len(outputs), k), np.float32), np.empty((len(outputs), k), np.int32)
        kernels.top_k(values, k, top, ids, threads)
        sums = np.empty((2, len(outputs), len(bounds) - 1, 3), np.float32)
        kernels.lse_parts(logits, inv_t, bounds, sums[0], threads)
        if values is logits:
            sums[1] = sums[0]
        else:
            kernels.lse_parts(values, inv_t, bounds, sums[1], threads)
        parts = np.concatenate([sums[0, :, :, :2], sums[1, :, :, ::2]], axis=2)
        raw = np.take_along_axis(logits, ids, axis=1)
        targets = np.full(len(outputs), np.nan, np.float32)
        for i, output in enumerate(outputs):
            if output.target != NO_TARGET and output.target in vocab:
                targets[i] = logits[i, output.target - vocab.start]
        mask = np.arange(k) < np.array([output.k for output in outputs])[:, None]
        return ids[mask] + np.int32(vocab.start), top[mask], raw[mask], parts, targets

    def _join(self, number: int, pieces: list[tuple[NDArray[np.generic], ...]], hidden: Floats) -> Reply:
        if not pieces:
            none = np.empty(0, np.float32)
            pieces = [(none.view(np.int32), none, none, np.empty((0, 0, PARTS), np.float32), none)]
        ids, values, raw, parts, targets = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Reply(number, ids, values, raw, parts, targets, hidden)


def _penalise(row: Floats, part: Part, vocab: range) -> None:
    """Repetition penalty of CTRL (Keskar et al. 2019, section 4.1), as transformers applies it: towards less likely."""
    own = part.seen[(part.seen >= vocab.start) & (part.seen < vocab.stop)] - vocab.start
    penalty = np.float32(part.penalty)
    row[own] = np.where(row[own] > 0, row[own] / penalty, row[own] * penalty)


def merge(replies: Seq[Reply], outputs: Seq[Output], shard_sizes: Seq[int]) -> list[Candidates]:
    """The shards' replies to the same outputs as one list of candidates each; `shard_sizes` in vocabulary rows."""
    merged = []
    at = [0] * len(replies)
    for i, output in enumerate(outputs):
        ids, values, raw = [], [], []
        for shard, reply in enumerate(replies):
            end = at[shard] + min(output.k, shard_sizes[shard])
            ids.append(reply.ids[at[shard] : end])
            values.append(reply.values[at[shard] : end])
            raw.append(reply.raw[at[shard] : end])
            at[shard] = end
        parts = np.concatenate([reply.parts[i] for reply in replies]).astype(np.float64)
        log_z, _ = _log_sum(parts[:, 0], parts[:, 1], 1.0)
        _, scaled_z = _log_sum(parts[:, 2], parts[:, 3], output.inv_t)
        target = [reply.targets[i] for reply in replies if not math.isnan(reply.targets[i])]
        all_ids, all_values, all_raw = np.concatenate(ids), np.concatenate(values), np.concatenate(raw)
        order = np.lexsort((all_ids, -all_values))[: output.k]
        merged.append(
            Candidates(
                all_ids[order],
                all_values[order],
                all_raw[order],
                log_z,
                scaled_z,
                complete=output.k >= sum(shard_sizes),
                target_logit=float(target[0]) if target else math.nan,
            )
        )
    return merged


def _log_sum(greatest: NDArray[np.float64], sums: NDArray[np.float64], inv_t: float) -> tuple[float, float]:
    """(log of the whole sum, the whole sum relative to the greatest) from panels' parts, added in panel order."""
    most = float(greatest.max())
    total = 0.0
    for top, part in zip(greatest.tolist(), sums.tolist(), strict=True):
        total += part * math.exp((top - most) * inv_t)
    return most * inv_t + math.log(total), total
