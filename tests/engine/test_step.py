"""The step message: what is packed is what is unpacked, and what it asks for comes in one order everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.engine import step as messages
from mpillm.engine.step import HEADER, Fetch, Hidden, Kind, Part, Step
from mpillm.kernels import KV_BLOCK


@st.composite
def parts(draw: st.DrawFn) -> Part:
    count = draw(st.integers(1, 70))
    start = draw(st.integers(0, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = lambda n: rng.integers(0, 50_000, n).astype(np.int32)  # noqa: E731
    return Part(
        start=start,
        tokens=ids(count),
        blocks=ids(-(-(start + count) // KV_BLOCK)),
        score_k=draw(st.integers(-1, 20)),
        successor=draw(st.sampled_from([-1, 17])),
        sample_k=draw(st.sampled_from([0, 1, 128, 200_000])),
        logprobs=draw(st.integers(-1, 20)),
        temperature=draw(st.floats(0, 10, width=32)),
        penalty=draw(st.sampled_from([1.0, 1.25])),
        seen=ids(draw(st.integers(0, 9))),
        hidden=draw(st.sampled_from(Hidden)),
    )


@given(st.lists(parts(), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_round_trip(made: list[Part], number: int) -> None:
    step = Step(number, tuple(made))
    message = step.encode()
    integers = sum(10 + len(p.tokens) + len(p.blocks) + len(p.seen) for p in made)
    assert HEADER.size == 24
    assert len(message) == 24 + 4 * integers
    assert messages.kind_of(message) is Kind.STEP
    back = Step.decode(message)
    assert back.encode() == message
    assert back.outputs == step.outputs
    assert np.array_equal(back.hidden_rows(), step.hidden_rows())
    batch, other = step.batch(), back.batch()
    for name in ("tokens", "positions", "table", "table_start", "block", "offset"):
        assert np.array_equal(getattr(batch, name), getattr(other, name))
    for row, (position, block, offset) in enumerate(
        zip(batch.positions, batch.block, batch.offset, strict=True)
    ):
        assert position % KV_BLOCK == offset
        assert batch.table[batch.table_start[row] + position // KV_BLOCK] == block


def test_outputs_are_scored_rows_then_the_sampled_row() -> None:
    tokens = np.array([5, 6, 7], np.int32)
    scored = Part(0, tokens, np.zeros(1, np.int32), score_k=2, successor=8)
    last = Part(
        3, tokens[:2], np.zeros(1, np.int32), score_k=0, sample_k=4, temperature=0.5, penalty=1.5, logprobs=3
    )
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
    assert messages.kind_of(fetch.encode()) is Kind.FETCH
    assert Fetch.decode(fetch.encode()) == fetch
    stop = messages.stop_message(75)
    assert messages.kind_of(stop) is Kind.STOP
    assert messages.exit_code_of(stop) == 75


def test_what_is_no_message_is_refused() -> None:
    step = Step(0, (Part(0, np.zeros(3, np.int32), np.zeros(1, np.int32)),)).encode()
    with pytest.raises(ValueError, match="shorter than its header"):
        messages.kind_of(step[:20])
    with pytest.raises(ValueError, match="starts with 0x00000000"):
        messages.kind_of(bytes(24))
    with pytest.raises(ValueError, match="does not match its header"):
        Step.decode(step[:-4])
    with pytest.raises(ValueError, match="does not match its header"):
        Fetch.decode(Fetch(1, (1, 2), 3).encode()[:-4])
    for at, wrong in ((1, 4), (1, -3), (2, 2), (0, -1), (0, 30)):  # tokens, blocks, start of the only part
        words = np.frombuffer(step, "<i4").copy()
        words[HEADER.size // 4 + at] = wrong
        with pytest.raises(ValueError, match=r"do not make up what its header says|lie outside its blocks"):
            Step.decode(words.tobytes())
