"""What shards answer and how it is put together: the same candidates and bits however the vocabulary is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpillm.engine.adjust import bits
from mpillm.engine.messages import Fetch
from mpillm.engine.reply import Reply, ReplyBuilder, merge
from mpillm.engine.sampler import FORBIDDEN, Candidates, inverse_temperature
from mpillm.engine.step import NO_IDS, Chunk, Shifts, Step

VOCAB, PANELS, WIDTH = 160, 8, 3


def step() -> Step:
    """A part of every kind: scored, drawn, greedy, adjusted, and one that is only read."""
    ids = lambda *values: np.array(values, np.int32)  # noqa: E731
    floats = lambda *values: np.array(values, np.float32)  # noqa: E731
    parts = [
        Chunk(0, ids(5, 6, 7), NO_IDS, score_k=2, successor=159),
        Chunk(9, ids(1), NO_IDS, sample_k=128, temperature=0.7),
        Chunk(9, ids(2), NO_IDS, sample_k=1),
        Chunk(0, ids(3, 4), NO_IDS),
        Chunk(9, ids(1), NO_IDS, sample_k=4, logprobs=3, penalty=1.5, seen=ids(*range(0, VOCAB, 3))),
        Chunk(9, ids(1), NO_IDS, score_k=0, successor=20, sample_k=30, temperature=2.0, logprobs=0),
        Chunk(
            9,
            ids(8),
            NO_IDS,
            sample_k=40,
            temperature=0.6,
            penalty=1.5,
            seen=ids(*range(0, VOCAB, 3)),
            shifts=Shifts(ids(3, 4, 159), floats(2, -5, 100), floats(-1.5, 0, -0.25)),
            allowed=bits(frozenset(range(2, VOCAB, 2)) | {3, 159}, VOCAB),
        ),
    ]
    return Step(7, tuple(parts))


def answers(shards: int, logits: np.ndarray) -> tuple[list[ReplyBuilder], list[Reply]]:
    """Each shard's answerer, with a decoder whose hidden states are rows' numbers, and their replies as they travel."""
    answerers = []
    for shard in range(shards):
        vocab = range(shard * VOCAB // shards, (shard + 1) * VOCAB // shards)
        own = np.ascontiguousarray(logits[:, vocab.start : vocab.stop])
        decoder: Any = SimpleNamespace(
            place=SimpleNamespace(shard=shard),
            vocab=vocab,
            vocab_bounds=np.arange(0, len(vocab) + 1, VOCAB // PANELS, dtype=np.int32),
            final_norm=lambda x: x,
            logits=lambda x, own=own: own[x[:, 0].astype(int)],
        )
        answerers.append(ReplyBuilder(decoder, keep_steps=1, threads=1))
    x = np.repeat(np.arange(len(logits), dtype=np.float32)[:, None], WIDTH, axis=1)
    return answerers, [_travel(answerer.build(step(), x)) for answerer in answerers]


def _travel(reply: Reply) -> Reply:
    return Reply.decode(reply.encode(), WIDTH)


def same(one: Candidates, other: Candidates) -> bool:
    arrays = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("ids", "values", "raw", "weights")
    )
    numbers = [(c.log_z, c.scaled_z, c.target_logit) for c in (one, other)]
    return arrays and np.array_equal(*numbers, equal_nan=True) and one.complete == other.complete


def rows() -> np.ndarray:
    logits = np.random.default_rng(1).normal(0, 3, (10, VOCAB)).astype(np.float32)
    logits[:, 40:44] = logits[:, 120:124]  # ties across shards
    return logits


def test_one_shard_gives_what_the_logits_say() -> None:
    logits = rows()
    outputs = step().outputs
    merged = merge(answers(1, logits)[1], outputs, [VOCAB])
    assert [output.row for output in outputs] == [0, 1, 2, 3, 4, 7, 7, 8, 8, 9]
    for output, found in zip(outputs, merged, strict=True):
        raw, part = logits[output.row], step().chunks[output.chunk]
        values = raw.copy()
        if output.adjusted:
            if len(part.allowed):
                kept = [*range(2, VOCAB, 2), 3, 159]
                values[np.setdiff1d(np.arange(VOCAB), kept)] = FORBIDDEN
            values[part.shifts.ids] += part.shifts.before
            penalised = np.where(values > 0, values / np.float32(1.5), values * np.float32(1.5))
            values[part.seen] = penalised[part.seen]
            values[part.shifts.ids] += part.shifts.after
        order = np.lexsort((np.arange(VOCAB), -values))[: output.k]
        assert found.ids.tolist() == order.tolist()
        assert found.values.tolist() == values[order].tolist()
        assert found.raw.tolist() == raw[order].tolist()
        assert found.complete == (output.k == VOCAB)
        exact = raw.astype(np.float64)
        if output.target >= 0:
            assert found.target_logit == raw[output.target]
        if output.normalised:
            assert found.log_z == pytest.approx(np.log(np.exp(exact).sum()), rel=1e-6)
            inv_t = inverse_temperature(part.temperature) if output.sampled else 1.0
            relative = np.exp((values.astype(np.float64) - values.max()) * inv_t)
            assert found.scaled_z == pytest.approx(relative.sum(), rel=1e-5)
            if output.sampled:
                assert found.weights == pytest.approx(relative[order], rel=1e-6)
        else:
            assert np.isnan(found.log_z)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_shards_give_the_same_bits_as_one(shards: int) -> None:
    logits, outputs = rows(), step().outputs
    whole = merge(answers(1, logits)[1], outputs, [VOCAB])
    parts = merge(answers(shards, logits)[1], outputs, [VOCAB // shards] * shards)
    assert all(same(one, other) for one, other in zip(whole, parts, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.5e38])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_rows_that_are_not_finite_are_told_and_cost_no_other(shards: int, bad: float) -> None:
    """Also one value in one shard; a sum that overflows is no such row."""
    logits, outputs = rows(), step().outputs
    sizes = [VOCAB // shards] * shards
    sound = merge(answers(shards, logits)[1], outputs, sizes)
    logits[[2, 7], 150:154] = bad
    found = merge(answers(shards, logits)[1], outputs, sizes)
    expected = [output.row not in (2, 7) or bad == 1.5e38 for output in outputs]
    assert [candidates.finite for candidates in found] == expected
    for output, one, other in zip(outputs, found, sound, strict=True):
        assert output.row in (2, 7) or same(one, other)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("k", [140, VOCAB])
def test_more_candidates_go_on_where_the_first_ended(shards: int, k: int) -> None:
    logits, outputs = rows(), step().outputs
    answerers, replies = answers(shards, logits)
    sizes = [VOCAB // shards] * shards
    first = merge(replies, outputs, sizes)
    wanted = (3, 8)
    fetched = [_travel(answerer.fetch(Fetch(7, wanted, k))) for answerer in answerers]
    more = merge(fetched, [outputs[i]._replace(k=k) for i in wanted], sizes)
    for i, found in zip(wanted, more, strict=True):
        known = len(first[i].ids)
        assert len(found.ids) == k
        assert found.complete == (k == VOCAB)
        assert np.array_equal(found.ids[:known], first[i].ids)
        assert np.array_equal(found.weights[:known], first[i].weights)
        assert (found.log_z, found.scaled_z) == (first[i].log_z, first[i].scaled_z)


def test_a_step_that_only_computes_has_an_empty_answer() -> None:
    only = Step(1, (Chunk(0, np.zeros(2, np.int32), NO_IDS),))
    assert only.outputs == []
    decoder: Any = SimpleNamespace(place=SimpleNamespace(shard=0), final_norm=lambda x: x)
    reply = ReplyBuilder(decoder, keep_steps=1, threads=1).build(only, np.zeros((2, WIDTH), np.float32))
    assert merge([_travel(reply)], only.outputs, [VOCAB]) == []


def test_an_answer_to_something_else_is_refused() -> None:
    _, (reply,) = answers(1, rows())
    message = reply.encode()
    for wrong in (b"", message[:8], message[:-3]):
        with pytest.raises(ValueError, match="is shorter than its header, or no whole words"):
            Reply.decode(wrong, WIDTH)
    with pytest.raises(ValueError, match="does not match its header"):
        Reply.decode(message[:40], WIDTH)
    with pytest.raises(
        ValueError, match=r"shard 0 replied \d+ candidates of \d+ outputs where \d+ of 2 were"
    ):
        merge([reply], step().outputs[:2], [VOCAB])
