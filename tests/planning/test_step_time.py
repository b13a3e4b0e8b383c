"""The model of a step's time, by numbers: products, disk, the KV cache, messages, micro-batches and a whole job."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.kernels import KV_BLOCK, BlockType
from mpillm.planning.job_time import PROMPT_TOKEN, REQUEST, Demand, job_time
from mpillm.planning.speed import WIDTH, Speed
from mpillm.planning.stage_time import (
    HIDDEN,
    INSIDE,
    LinkRate,
    Stage,
    between,
    round_of,
    stage_time,
)
from mpillm.planning.step_time import (
    APART,
    DRAWN,
    LAYER,
    LOAD,
    NARROW,
    ONE_BY_ONE,
    PERIOD,
    STEP,
    STREAMED,
    WAIT,
    AttentionWork,
    RankWork,
    StepRows,
    disk_rate,
    rank_time,
)
from tests.job_helpers import CHAT
from tests.planning.times import main as compare_times

SPEED = Speed(
    {"q4_0": (1e9, 4e9, 8e9), "f32": (1e9, 1e9, 1e9)},
    memory=1e9, disk=1e8, attention=(1e9, 2e9), values=1e9, core=1.0, latency=1e-3, wire=1e6,
)  # fmt: skip
ONE = StepRows(rows=1, sequences=1, context=0)


def work(layers: int = 2, weights: float = 1e9, **more: object) -> RankWork:
    values = {
        "layers": layers, "products": {BlockType.Q4_0: weights}, "experts": {}, "head": {}, "expert_share": 1.0,
        "streamed": 0, "streamed_experts": 0, "attention": (),
    }  # fmt: skip
    return RankWork(**{**values, **more})  # type: ignore[arg-type]


def stage(
    *works: RankWork, link: LinkRate = INSIDE, pipe: LinkRate | None = None, speed: Speed = SPEED
) -> Stage:
    return Stage(
        works,
        [speed] * len(works),
        sum_bytes=2 * 1000 * (len(works) - 1),
        link=link,
        pipe_bytes=500,
        pipe=pipe,
    )


def test_products_and_what_each_layer_takes() -> None:
    one, four = (rank_time(work(), SPEED, StepRows(rows, rows, 0)) for rows in (1, 4))
    assert (one.products, four.products) == (2.0, 2.0)  # four rows take no longer: the weights are read once
    assert one.other == pytest.approx(STEP + DRAWN + 2 * (LAYER + WAIT))
    assert (one.limit, rank_time(work(), SPEED, StepRows(16, 16, 0)).limit) == (
        "reading weights from memory",
        "computing",
    )
    assert rank_time(work(head={BlockType.Q4_0: 5e8}), SPEED, StepRows(16, 1, 0)).products == 4 + 1


def test_only_chosen_experts_are_computed_and_read() -> None:
    mixture = work(
        products={},
        experts={BlockType.Q4_0: 1e9},
        expert_share=0.25,
        streamed=10**9,
        streamed_experts=4 * 10**8,
    )
    one = rank_time(mixture, SPEED, ONE)
    assert one.products == 2 * 0.25
    assert one.disk == pytest.approx((6e8 + 0.25 * 4e8) / 1e8)
    many = rank_time(mixture, SPEED, StepRows(64, 64, 0))
    assert many.products == pytest.approx(2e9 * 16 / 8e9)
    assert many.disk == pytest.approx(10)


def test_a_disk_counts_where_it_is_slower_than_all_that_goes_on_meanwhile() -> None:
    slow, fast = (rank_time(work(streamed=nbytes), SPEED, ONE) for nbytes in (10**9, 10**8))
    assert (slow.total, slow.limit) == (10.0, "reading weights from disk")
    assert fast.total == 2.0 + fast.other


def test_what_is_no_product_takes_time_by_rows_and_pages_and_by_the_core() -> None:
    """Values of rows, logits that are asked for, layers apart, pages that are loaded; half of it on a faster core."""
    rows = StepRows(100, 3, 0, scored=7)
    first = rank_time(work(), SPEED, rows).other
    wide = rank_time(work(values=1e4, head={BlockType.Q4_0: 2e9}, head_values=1e6), SPEED, rows)
    assert wide.other - first == pytest.approx((100 * 1e4 + 10 * 1e6) / 1e9)
    # Matrices of 2048 columns would have 1000 values for as many weights.
    narrow = rank_time(work(weights=WIDTH * 500, values=3000), SPEED, rows)
    assert narrow.other - first == pytest.approx(100 * (3000 + NARROW * 2000) / 1e9)
    assert rank_time(work(apart=True), SPEED, rows).other - first == pytest.approx(2 * APART)
    paged = rank_time(work(streamed=10**6, page=1e5), SPEED, rows)
    assert paged.other - first == pytest.approx(10 * LOAD + 10**6 * STREAMED)
    assert rank_time(work(), replace(SPEED, core=2.0), rows).other == pytest.approx(first / 2)


def test_pages_that_all_are_streamed_are_not_all_read_while_others_are_used() -> None:
    """A part of computing waits where nothing stays; with half of the pages in memory it is a quarter of that."""
    stays, half, all_of = (rank_time(work(streamed=10**9, page=1e6, streamed_part=part), SPEED, ONE)
                           for part in (0.0, 0.5, 1.0))  # fmt: skip
    computing = stays.products + stays.kv + stays.other
    assert stays.total == stays.disk > computing
    assert all_of.total - stays.total == pytest.approx(ONE_BY_ONE * computing)
    assert half.total - stays.total == pytest.approx(ONE_BY_ONE * computing / 4)


def test_small_pages_are_read_at_the_rate_of_small_requests() -> None:
    disk = replace(SPEED, disk=4e9, pages=1e9)
    rates = [disk_rate(disk, page) for page in (1000, 512 * 1024, 2**21, 2**22, 2**30)]
    assert rates == pytest.approx([1e9, 1e9, 4e9 ** (2 / 3) * 1e9 ** (1 / 3), 4e9, 4e9])
    assert disk_rate(SPEED, 1000) == SPEED.disk


def test_keys_and_values_are_read_by_each_sequence_up_to_the_window() -> None:
    attending = work(attention=[AttentionWork(0, 1000, 0), AttentionWork(64, 1000, 0)])
    blocks = 2 * KV_BLOCK / 2  # of each the last one is read whole
    assert rank_time(attending, SPEED, StepRows(4, 4, 1000)).kv == pytest.approx(
        4 * (1000 + 64 + blocks) * 1000 / 1e9
    )
    prompt = work(attention=[AttentionWork(0, 0, 1000)])
    assert rank_time(prompt, SPEED, StepRows(500, 1, 250)).kv == pytest.approx(
        500 * (250 + KV_BLOCK) * 1000 / 2e9
    )


def test_messages_of_shards_and_stages() -> None:
    net = between([SPEED, Speed({}, 1, 1, latency=2e-3, wire=5e6)])
    assert net == LinkRate(2e-3, 1e6)
    two = stage_time(stage(work(), work(), link=net, pipe=net), StepRows(3, 3, 0))
    assert two.messages == pytest.approx(2 * 2 * (2e-3 + 3000 / 1e6) + 2e-3 + 2 * 3 * 500 / 1e6)
    four = stage_time(stage(*[work()] * 4, link=net), StepRows(3, 3, 0))  # a quarter to each other one, twice
    assert four.messages == pytest.approx(2 * 2 * 2 * (2e-3 + 3 * 750 / 1e6))
    fast = LinkRate(2e-3, 1e9)  # few bytes for it: one shard sums, and takes and sends three times a row
    assert stage_time(stage(*[work()] * 4, link=fast), ONE).messages == pytest.approx(
        2 * 2 * 2 * (2e-3 + 3 * 1000 / 1e9)
    )
    assert stage_time(stage(work()), ONE).messages == 0


def test_messages_of_rows_in_lanes_are_partly_hidden() -> None:
    """A lane's messages travel while the other is computed, of many rows that a network carries for long."""
    net, rows = LinkRate(0.0, 1e5), StepRows(32, 32, 0)
    whole = 2 * 2 * 1000 * 32 / 1e5 / 1  # twice in each of two layers a kilobyte of each row
    computing = rank_time(work(), SPEED, rows).total
    made = stage_time(stage(work(), work(), link=net), rows)
    assert made.messages == pytest.approx(whole - HIDDEN * min(whole, computing))
    alone = stage_time(stage(work(stacked=False), work(stacked=False), link=net), rows)
    assert alone.messages == pytest.approx(whole)
    assert stage_time(stage(work(), work(), link=LinkRate(0.0, 1e9)), rows).messages == pytest.approx(
        whole / 1e4
    )


def times(*seconds: float) -> Sequence[Stage]:
    """Stages whose products of one row take so long."""
    return [stage(work(0, second / 2 * 1e9)) for second in seconds]


def test_as_many_micro_batches_as_stages_keep_all_busy() -> None:
    # One row and two rows take as long: one micro-batch is as good.
    even = round_of(times(1, 1), StepRows(2, 2, 0))
    assert even.seconds == pytest.approx(2 * (1 + STEP + DRAWN))  # two halves in turns
    full = round_of(times(1, 1), StepRows(64, 64, 0))
    assert (full.micro_batches, full.bubble) == (2, pytest.approx(0))
    one = round_of(times(1, 1, 1, 1), ONE)
    assert (one.micro_batches, one.bubble) == (1, pytest.approx(0.75))
    uneven = round_of(times(1, 3), StepRows(64, 64, 0))
    assert (uneven.slowest, uneven.bubble) == (1, pytest.approx(1 / 3, abs=0.01))


def test_ranks_with_a_part_of_a_core_run_at_full_speed_after_a_wait() -> None:
    """Stages in turn use their part while the others wait; then each of them is stopped, as one that never waits is."""
    quarter = replace(SPEED.slowed(4), part=0.25)

    def seconds(count: int, each: float, speed: Speed) -> float:
        own = work(0, each / 2 * 1e9)
        return round_of([stage(own, speed=speed) for _ in range(count)], ONE).seconds

    outside = STEP + DRAWN
    assert seconds(1, 0.02, quarter) == pytest.approx(4 * (0.02 + outside))
    assert seconds(4, 0.02, quarter) == pytest.approx(4 * (0.02 + outside)) == seconds(4, 0.02, SPEED)
    assert seconds(8, 0.02, quarter) == pytest.approx(8 * (0.02 + outside))
    assert seconds(2, 0.02, quarter) == pytest.approx(4 * (0.02 + outside))  # the part is used up
    # Ten times the part of a period: stopped ten times, wherever it began.
    assert seconds(8, 0.25, quarter) == pytest.approx(8 * (0.25 + outside + 10 * 0.75 * PERIOD))


def test_polling_for_messages_takes_time_from_a_part_of_a_core() -> None:
    net = LinkRate(1e-3, 1e6)
    half = stage(work(), work(), link=net, speed=replace(SPEED, part=0.5))
    always, stopped = stage_time(stage(work(), work(), link=net), ONE), stage_time(half, ONE)
    assert stopped.total == pytest.approx(always.total + 2 * 2 * 1e-3)
    assert stopped.messages == always.messages


def test_a_job_is_its_prompts_and_then_its_answers_in_turns() -> None:
    stages = times(1)
    made = job_time(
        stages, Demand(requests=8, prompt=800, generated=80), step_tokens=400, sequences=4, loading=3.0
    )
    assert made.prefill == pytest.approx(2 * (400 / 8 + STEP + 4 * DRAWN))
    assert made.decode == pytest.approx(2 * 10 * (1 + STEP + 4 * DRAWN))
    assert made.sequences == 4
    assert made.seconds == pytest.approx(made.prefill + made.decode + 8 * REQUEST + 800 * PROMPT_TOKEN + 3.0)


def test_guessed_tokens_take_rows_and_those_accepted_no_steps() -> None:
    stages = times(1)
    asked = Demand(requests=8, prompt=0, generated=80, drafted=120, accepted=40)
    made = job_time(stages, asked, step_tokens=400, sequences=4)
    # Four sequences with three guesses each, which have logits too, in half as many rounds.
    full = round_of(stages, StepRows(16, 4, asked.context, 12)).seconds
    assert made.decode == pytest.approx(2 * 5 * full)
    assert full > round_of(stages, StepRows(4, 4, asked.context)).seconds
    assert asked.of(4) == Demand(requests=4, prompt=0, generated=40, drafted=60, accepted=20)


def test_each_line_takes_rank_0_some_time() -> None:
    """However small the model is, ten thousand lines of one token take seconds; one line does not."""
    small = [stage(work(weights=1.0))]
    one, many = (job_time(small, Demand(count, 0, float(count)), 512, 1e6) for count in (1, 10_000))
    assert many.lines == pytest.approx(10_000 * REQUEST)
    assert one.lines == pytest.approx(REQUEST)


def test_planned_and_measured_times_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m tests.planning.times`, one small job of it."""
    monkeypatch.setattr("tests.planning.times.RUNS", 2)
    monkeypatch.setattr("sys.argv", ["times", "--model", str(CHAT), "--only", "one answer"])
    compare_times()
    printed = capsys.readouterr().out
    pair = r" +[\d.]+ +[\d.]+ +\d+\.\d\d (ok|OFF)"
    head = r"seconds, MiB +planned +measured +ratio +planned +measured +ratio"
    line = rf"one answer{pair} *{pair} +\d+\.\d\d \d+\.\d\d"
    assert re.fullmatch(rf"{head} +all runs\n{line}\n", printed), printed


def faster(speed: Speed, key: str, times: float) -> Speed:
    """A rank of which one rate is so many times as high."""
    if key == "products":
        return replace(
            speed, products={kind: [times * rate for rate in rates] for kind, rates in speed.products.items()}
        )
    if key == "attention":
        return replace(speed, attention=(times * speed.attention[0], times * speed.attention[1]))
    return replace(speed, **{key: times * getattr(speed, key)})


@given(
    draws=st.data(),
    layers=st.integers(1, 80),
    kind=st.sampled_from([BlockType.Q4_0, BlockType.Q4_K, BlockType.Q8_0, BlockType.BF16]),
    streams=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    requests=st.integers(1, 2000),
    prompt=st.integers(1, 4000),
    generated=st.integers(0, 2000),
    sequences=st.integers(1, 256),
)
def test_a_faster_machine_or_a_smaller_job_never_takes_longer(
    draws: st.DataObject, layers: int, kind: BlockType, streams: float, requests: int, prompt: int, generated: int,
    sequences: int,
) -> None:  # fmt: skip
    rate = st.floats(1e8, 1e12)
    # Four times as many rows take no less time, and no more than one by one.
    rates = st.tuples(rate, *[st.floats(1, 4)] * 3).map(lambda drawn: list(accumulate(drawn, mul)))
    speed = Speed(
        {name: draws.draw(rates) for name in ("q4_0", "q4_k", "q8_0", "bf16", "f32")},
        memory=draws.draw(rate), disk=draws.draw(rate), attention=(draws.draw(rate), draws.draw(rate)),
        values=draws.draw(rate), fill=draws.draw(rate), core=draws.draw(st.floats(0.05, 2)),
    )  # fmt: skip
    weights = draws.draw(st.floats(1e6, 1e10))
    streamed = int(weights * 0.56 * streams)
    own = work(layers, 0, products={kind: weights}, streamed=streamed, streamed_part=streams,
               page=weights * 0.56 / layers, values=weights / 1000,
               attention=[AttentionWork(0, 4096, 16384)])  # fmt: skip

    def seconds(
        speed: Speed, requests: int = requests, prompt: int = prompt, generated: int = generated
    ) -> float:
        asked = Demand(requests, requests * prompt, requests * generated)
        return job_time([stage(own, speed=speed)], asked, 512, sequences).seconds

    now = seconds(speed) * (1 + 1e-9)
    for key in ("products", "memory", "disk", "attention", "values", "core"):
        assert seconds(faster(speed, key, draws.draw(st.floats(1, 10)))) <= now, key
    assert seconds(speed, requests=-(-requests // 2)) <= now
    assert seconds(speed, prompt=-(-prompt // 2)) <= now
    assert seconds(speed, generated=generated // 2) <= now
