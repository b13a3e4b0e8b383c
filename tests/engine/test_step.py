"""The step message: what is packed is what is unpacked, and what it asks for comes in one order everywhere."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.engine.messages import HEADER, Fetch, Stop, decode, encode
from mpillm.engine.step import NO_IDS, NO_SECOND, Chunk, Hidden, Shifts, Step, Table
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import first_kept

MASKS = [np.array(words, np.int32) for words in ([1, -1, 7], [0, 0, 1])]
ONE_BLOCK = (Table(0, np.zeros(1, np.int32)),)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    windows = draw(st.lists(st.sampled_from([0, 1, 20, 33, 64]), max_size=3))
    chunks = draw(st.lists(_chunks(windows), min_size=1, max_size=8))
    return Step(draw(st.integers(0, 2**32 - 1)), tuple(chunks))


@st.composite
def _chunks(draw: st.DrawFn, windows: list[int]) -> Chunk:
    count = draw(st.integers(1, 70))
    start = draw(st.integers(0, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = lambda n: rng.integers(0, 50_000, n).astype(np.int32)  # noqa: E731
    firsts = [first_kept(start, window) for window in windows]
    return Chunk(
        start=start,
        tokens=ids(count),
        tables=tuple(Table(first, ids(-(-(start + count) // KV_BLOCK) - first)) for first in firsts),
        slot=draw(st.integers(-1, 5)),
        loads=draw(st.integers(-1, 2)),
        saves=draw(st.integers(-1, 2)),
        second=draw(st.sampled_from([NO_SECOND, 0, 30])),
        score_k=draw(st.integers(-1, 20)),
        successor=draw(st.sampled_from([-1, 17])),
        sample_k=draw(st.sampled_from([0, 1, 128, 200_000])),
        logprobs=draw(st.integers(-1, 20)),
        temperature=draw(st.floats(0, 10, width=32)),
        penalty=draw(st.sampled_from([1.0, 1.25])),
        seen=ids(draw(st.integers(0, 9))),
        shifts=_shifts(rng, draw(st.integers(0, 5))),
        allowed=draw(st.sampled_from([NO_IDS, *MASKS])),
        hidden=draw(st.sampled_from(Hidden)),
        adapter=draw(st.integers(0, 3)),
        long=draw(st.booleans()),
    )


def _shifts(rng: np.random.Generator, count: int) -> Shifts:
    ids = rng.integers(0, 50_000, count).astype(np.int32)
    return Shifts(ids, *rng.normal(0, 9, (2, count)).astype(np.float32))


@given(steps())
def test_round_trip(step: Step) -> None:
    message = encode(step)
    integers = 0
    for chunk in step.chunks:
        integers += 18 + len(chunk.tokens) + len(chunk.seen) + 3 * len(chunk.shifts.ids)
        integers += sum(2 + len(table.blocks) for table in chunk.tables)
    masks = {chunk.allowed.tobytes() for chunk in step.chunks} - {b""}
    assert HEADER.size == 40
    assert len(message) == 40 + 4 * integers + sum(map(len, masks))
    back = decode(message)
    assert isinstance(back, Step)
    assert encode(back) == message
    assert back.outputs == step.outputs
    assert [chunk.adapter for chunk in back.chunks] == [chunk.adapter for chunk in step.chunks]
    for chunk, other in zip(step.chunks, back.chunks, strict=True):
        assert np.array_equal(chunk.allowed, other.allowed)
        assert all(map(np.array_equal, chunk.shifts, other.shifts))
    assert np.array_equal(back.hidden_rows(), step.hidden_rows())
    batch, other = step.batch(), back.batch()
    for name in ("tokens", "positions", "offset", "first_rows", "slots"):
        assert np.array_equal(getattr(batch, name), getattr(other, name))
    assert batch.states == other.states
    assert batch.slots.tolist() == [chunk.slot for chunk in step.chunks]
    rows = [(chunk, chunk.start + i) for chunk in step.chunks for i in range(len(chunk.tokens))]
    second = [False] * len(rows) if batch.second is None else batch.second.tolist()
    assert second == [position >= chunk.second for chunk, position in rows]
    assert batch.positions.tolist() == [position for _, position in rows]
    assert [rows[row] for row in batch.first_rows] == [(chunk, chunk.start) for chunk in step.chunks]
    assert np.array_equal(batch.offset, batch.positions % KV_BLOCK)
    assert len(batch.groups) == len(other.groups) == len(step.chunks[0].tables)
    for number, (group, same) in enumerate(zip(batch.groups, other.groups, strict=True)):
        assert np.array_equal(group.block, same.block)
        assert group.table_start.min() >= 0
        tables = [(chunk.tables[number].first, chunk.tables[number].blocks.tolist()) for chunk in step.chunks]
        assert group.table[group.padding :].tolist() == [
            block
            for (_, blocks), _ in groupby(tables)
            for block in blocks  # neighbours with the same one share it
        ]
        for row, (chunk, position) in enumerate(rows):
            first, blocks = chunk.tables[number]
            assert group.block[row] == blocks[position // KV_BLOCK - first]
            for index in range(first, position // KV_BLOCK + 1):
                assert group.table[group.table_start[row] + index] == blocks[index - first]


def test_outputs_are_scored_rows_then_the_sampled_row() -> None:
    tokens = np.array([5, 6, 7], np.int32)
    scored = Chunk(0, tokens, ONE_BLOCK, score_k=2, successor=8)
    last = Chunk(3, tokens[:2], ONE_BLOCK, score_k=0, sample_k=4, temperature=0.5, penalty=1.5, logprobs=3)
    outputs = Step(1, (scored, last)).outputs
    assert [(o.row, o.k, o.target, o.sampled) for o in outputs] == [
        (0, 2, 6, False),
        (1, 2, 7, False),
        (2, 2, 8, False),
        (3, 0, 6, False),
        (4, 3, -1, False),  # without the penalty, for log-probabilities
        (4, 4, -1, True),
    ]
    assert [o.inv_t for o in outputs if o.sampled] == [2.0]


def test_fetch_and_stop() -> None:
    fetch = Fetch(9, (3, 5), 1000)
    assert decode(encode(fetch)) == fetch
    assert decode(encode(Stop(75))) == Stop(75)


def test_what_is_no_message_is_refused() -> None:
    step = encode(Step(0, (Chunk(0, np.zeros(3, np.int32), ONE_BLOCK),)))
    with pytest.raises(ValueError, match="shorter than its header"):
        decode(step[:20])
    with pytest.raises(ValueError, match="starts with 0x00000000"):
        decode(bytes(40))
    with pytest.raises(ValueError, match="does not match its header"):
        decode(step[:-4])
    with pytest.raises(ValueError, match="does not match its header"):
        decode(encode(Fetch(1, (1, 2), 3))[:-4])
    # Tokens, blocks, start, first block, shifts and mask of the only chunk.
    wrongs = (
        (1, 4),
        (1, -3),
        (19, 2),
        (19, -1),
        (0, -1),
        (0, 30),
        (18, 1),
        (18, -1),
        (9, 1),
        (10, 0),
        (10, -2),
    )
    for at, wrong in wrongs:
        words = np.frombuffer(step, "<i4").copy()
        words[HEADER.size // 4 + at] = wrong
        with pytest.raises(ValueError, match=r"do not match its header|lie outside its blocks"):
            decode(words.tobytes())
