"""One state for each sequence: the same bytes with any cut into steps, with preemption, after a kill, on any layout."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.engine.request import Request
from mpillm.model.cache_layout import CacheLayout
from mpillm.model.kv import KVCache, StateMoves
from tests.agnostic import harness
from tests.agnostic.program import digest
from tests.conftest import Mpi
from tests.model.engine_harness import _alone
from tests.model.recurrent import install

PROGRAM = Path(__file__).with_name("recurrent_ranks.py")
# Model, layers that become recurrent: beside attention in all of two others, beside windows, and without any attention;
# and models that are recurrent without that.
MODELS = [
    ("llama3", frozenset({1, 2})),
    ("qwen2_window", frozenset({1})),
    ("qwen3", frozenset({0, 1})),
    ("qwen3_next", frozenset[int]()),
    ("qwen35", frozenset[int]()),
    ("lfm2_moe", frozenset[int]()),
    ("falcon_h1", frozenset[int]()),
    ("nemotron_h", frozenset[int]()),
]
BOTH = frozenset({0})  # keeps its attention unless it is recurrent

pytestmark = pytest.mark.skipif(kernels.path() == "numpy", reason="NumPy's products promise less")

cases = pytest.mark.parametrize(("model", "recurrent"), MODELS)


@functools.cache
def requests(model: str) -> list[Request]:
    return harness.batch(harness.vocab_of(model))


def run(
    model: str, recurrent: frozenset[int], some: list[Request] | None = None, **job: Any
) -> harness.Outcome:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, recurrent, BOTH if recurrent else recurrent)
        return harness.run(_alone(), harness.path_of(model), some or requests(model), **job)


@functools.cache
def alone(model: str, recurrent: frozenset[int]) -> harness.Outcome:
    """What each request gives alone, at once, on one thread."""
    outcome = run(model, recurrent, max_num_seqs=1, threads=1)
    assert outcome.session.limits.n_slots == 1
    return outcome


def expected(model: str, recurrent: frozenset[int]) -> dict[harness.Name, harness.Values]:
    return alone(model, recurrent).values


def layout_of(model: str, recurrent: frozenset[int]) -> CacheLayout:
    return alone(model, recurrent).session.caches[0]


@pytest.mark.parametrize(("model", "recurrent"), MODELS[:3])
def test_a_state_counts(model: str, recurrent: frozenset[int]) -> None:
    without = harness.run(_alone(), harness.path_of(model), requests(model)).values
    values = expected(model, recurrent)
    assert len(values) == len(requests(model)) == len(without)
    assert all(value != without[name] for name, value in values.items() if value[3] or value[5])


@cases
def test_one_token_at_a_time(model: str, recurrent: frozenset[int]) -> None:
    some = requests(model)[::4]
    outcome = run(model, recurrent, some, max_num_seqs=1, max_num_batched_tokens=1)
    assert outcome.values == {
        (one.id, one.choice): expected(model, recurrent)[one.id, one.choice] for one in some
    }


@pytest.mark.parametrize(("sequences", "tokens"), [(7, 16), (32, 40), (32, 512)])
@cases
def test_any_cut_gives_the_same(model: str, recurrent: frozenset[int], sequences: int, tokens: int) -> None:
    outcome = run(model, recurrent, max_num_seqs=sequences, max_num_batched_tokens=tokens, threads=2)
    assert outcome.values == expected(model, recurrent)
    assert outcome.totals.shared_tokens > 0


@cases
def test_preempted_sequences_begin_anew(model: str, recurrent: frozenset[int]) -> None:
    """Half of the memory is for states; of the other half few sequences can have blocks."""
    layout = layout_of(model, recurrent)
    groups = len(layout.windows)
    budget = 2 * 5 * groups * layout.block_nbytes if groups else 3 * layout.state_nbytes
    outcome = run(model, recurrent, kv=budget, max_num_batched_tokens=100)
    limits = outcome.session.limits
    assert outcome.values == expected(model, recurrent)
    assert limits.n_blocks * layout.block_nbytes + limits.n_states * layout.state_nbytes <= budget
    assert outcome.session.kv.peak <= budget
    assert limits.n_slots > 0
    if groups and recurrent:  # the states of real models take so much that few sequences are admitted at all
        assert outcome.totals.preemptions > 0
    elif not groups:
        assert limits.n_slots == 3 == outcome.totals.peak_sequences


def test_states_that_were_in_use_are_counted() -> None:
    layout = layout_of("qwen35", frozenset())
    cache = KVCache(layout, 9, n_states=100)
    assert cache.peak == 0
    for _ in range(2):
        cache.begin((), np.zeros(0, np.int32), StateMoves(fresh=(3,), loaded=((4, 3),)))
        cache.end(StateMoves(saved=((7, 4),)))
    assert cache.peak == 3 * layout.state_nbytes > 0


@cases
def test_broken_off_and_gone_on(model: str, recurrent: frozenset[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, recurrent, BOTH if recurrent else recurrent)
        outcome = harness.run_in_pieces(
            _alone(), harness.path_of(model), requests(model), seed=2, max_num_seqs=9
        )
    assert outcome.values == expected(model, recurrent)


@pytest.mark.parametrize(("model", "recurrent"), [("mixed windows", frozenset({1, 4}))])
def test_blocks_on_disk_and_states_in_memory(model: str, recurrent: frozenset[int], tmp_path: Path) -> None:
    folder = str(harness.write_mixed_windows(tmp_path / "model")) if recurrent else model
    whole = expected(folder, recurrent)
    layout = layout_of(folder, recurrent)
    job = {"kv": 30 * layout.block_nbytes, "streams": True, "kv_spill": "1GiB", "spill_dir": str(tmp_path)}
    outcome = run(folder, recurrent, **job)
    assert outcome.values == whole
    assert outcome.session.kv.spill.counters.read > 0
    assert outcome.session.kv.peak <= 30 * layout.block_nbytes


@pytest.mark.mpiexec
@pytest.mark.parametrize(
    ("case", "stages", "shards"), [(MODELS[0], 2, 1), (MODELS[0], 1, 2), (MODELS[3], 2, 1), (MODELS[4], 1, 2)]
)
def test_two_ranks(
    case: tuple[str, frozenset[int]], stages: int, shards: int, openmpi: Mpi, tmp_path: Path
) -> None:
    model, recurrent = case
    layout = {"stages": stages, "shards": shards, "activations": "f32"}
    ways: list[dict[str, Any]] = [
        {}, {"kv_blocks": 7 if recurrent else 12, "max_num_seqs": 7, "max_num_batched_tokens": 40}
    ]  # fmt: skip
    target = tmp_path / "outcomes.json"
    settings = [json.dumps({**layout, **way}) for way in ways]
    done = openmpi.run(2, PROGRAM, ",".join(map(str, recurrent)) or "none", target, model, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    wide, tight = json.loads(target.read_text())
    assert wide["digest"] == tight["digest"] == digest(expected(model, recurrent))
    assert tight["totals"]["preemptions"] > 0 or not recurrent
