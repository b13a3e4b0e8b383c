"""Promise 4 on one rank: the same tokens and the same bits, whatever the batch, the cuts, the budget, the machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.comm.program import start
from mpillm.comm.world import World
from mpillm.engine.request import PartialCompletion, Request
from mpillm.run.statistics import rank_statistics
from tests.agnostic import harness
from tests.agnostic.harness import MODELS, Outcome

COMPILED = [name for name in kernels.available() if name != "numpy"]
pytestmark = pytest.mark.skipif(
    not COMPILED, reason="the extension is not built, and NumPy's products promise less"
)
TIGHT = 5  # blocks: the longest request needs four


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


@functools.cache
def world() -> World:
    return start()


@functools.cache
def requests(model: str) -> list[Request]:
    return harness.batch(harness.vocab_of(model))


def run(model: str, some: list[Request] | None = None, **job: Any) -> Outcome:
    return harness.run(world(), harness.path_of(model), requests(model) if some is None else some, **job)


@functools.cache
def expected(model: str) -> dict[harness.Name, harness.Values]:
    """What each request gives alone, at once, on one thread."""
    outcome = run(model, max_num_seqs=1, threads=1, prefix_sharing=False)
    assert len(outcome.values) == len(requests(model))
    assert outcome.totals.shared_tokens == outcome.totals.preemptions == 0
    return outcome.values


def assert_same(model: str, outcome: Outcome, some: list[Request] | None = None) -> None:
    names = {(one.id, one.choice) for one in (requests(model) if some is None else some)}
    assert outcome.values == {name: value for name, value in expected(model).items() if name in names}


CUTS = [(1, 512, True), (7, 16, True), (7, 16, False), (32, 40, True)]


@pytest.mark.parametrize(("sequences", "tokens", "prefix_sharing"), CUTS)
@pytest.mark.parametrize("model", MODELS)
def test_batches_and_chunks(model: str, sequences: int, tokens: int, prefix_sharing: bool) -> None:
    outcome = run(
        model, max_num_seqs=sequences, max_num_batched_tokens=tokens, prefix_sharing=prefix_sharing, threads=2
    )
    assert_same(model, outcome)
    assert (outcome.totals.shared_tokens > 0) is prefix_sharing
    assert outcome.totals.fetched_rows > 0 or harness.vocab_of(model) <= 128


@pytest.mark.parametrize("model", [*MODELS, "qwen3_next", "nemotron_h"])
def test_one_token_at_a_time(model: str) -> None:
    some = requests(model)[::4]
    assert_same(model, run(model, some, max_num_seqs=1, max_num_batched_tokens=1), some)


@pytest.mark.parametrize("model", [*MODELS, "qwen3_next", "nemotron_h"])
def test_threads(model: str) -> None:
    assert_same(model, run(model, threads=3))


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize(
    "model",
    [
        "llama3",
        "qwen3_moe",
        "deepseek_v3",
        "llama_mixed.gguf",
        "qwen3_next",
        "qwen35_f16.gguf",
        "lfm2",
        "nemotron_h",
    ],
)
def test_instruction_sets(model: str, path: str) -> None:
    """Of all kinds of requests those with short answers: more steps would call the same kernels again."""
    some = [one for one in requests(model) if one.max_tokens <= 16]
    kernels.set_path(path)
    assert_same(model, run(model, some), some)


def test_keys_and_values_in_q8_0() -> None:
    model = "llama_mixed.gguf"
    job: dict[str, Any] = {"kv_type": "q8_0"}
    alone = run(model, max_num_seqs=1, threads=1, prefix_sharing=False, **job).values
    assert alone != expected(model)
    for path in {"scalar", *COMPILED[-2:]}:
        kernels.set_path(path)
        assert run(model, threads=2, max_num_batched_tokens=40, **job).values == alone
    assert run(model, kv_blocks=TIGHT, **job).values == alone


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_tight_kv_cache(model: str, prefix_sharing: bool) -> None:
    outcome = run(model, kv_blocks=TIGHT, prefix_sharing=prefix_sharing)
    limits = outcome.session.limits
    assert limits.n_blocks == TIGHT * len(limits.windows)
    assert outcome.totals.preemptions > 0
    assert outcome.totals.recomputed_tokens > 0
    assert_same(model, outcome)


@pytest.mark.parametrize("model", [*MODELS, "qwen3_next", "nemotron_h"])
def test_streamed_weights(model: str) -> None:
    outcome = run(model, streams=True)
    assert outcome.session.weights.streamed > 0
    assert_same(model, outcome)


@pytest.mark.parametrize(("model", "kv_type"), [("llama3", "f16"), ("qwen3_moe", "f32")])
def test_a_kv_cache_on_disk(model: str, kv_type: str, tmp_path: Path) -> None:
    """With windows in some layers too: test_ranks.py, and beside states tests/model/test_states.py."""
    some = requests(model)[::2]
    job = {"kv_blocks": TIGHT, "streams": True, "kv_type": kv_type}
    without = run(model, some, **job)
    outcome = run(model, some, **job, kv_spill="1GiB", spill_dir=str(tmp_path))
    limits = outcome.session.limits
    assert limits.n_blocks > TIGHT * len(limits.windows) == limits.blocks_in_memory
    assert outcome.session.kv.spill.counters.read > 0
    assert outcome.session.kv.peak <= outcome.session.spec.memory.kv_bytes
    assert outcome.totals.preemptions < without.totals.preemptions
    assert outcome.values == without.values
    if kv_type == "f32":
        assert_same(model, outcome, some)


@pytest.mark.parametrize(
    ("model", "job"),
    [
        *((model, {}) for model in MODELS),
        ("llama3", {"max_num_seqs": 1}),
        ("llama3", {"streams": True, "max_num_batched_tokens": 50}),
        ("qwen2_window", {"kv_blocks": TIGHT}),
        ("llama_mixed.gguf", {"kv_blocks": TIGHT}),
    ],
)
def test_drafts(model: str, job: dict[str, Any]) -> None:
    outcome = run(model, **job, speculation="always")
    assert_same(model, outcome)
    totals = outcome.totals
    assert totals.drafted_tokens > totals.accepted_tokens > 0
    assert totals.generated_tokens == sum(len(tokens) for tokens, *_ in outcome.values.values())
    # Without drafts each turn draws one token.
    assert totals.turns == totals.generated_tokens - totals.accepted_tokens
    # Each row is one of the prompts', one of an answer's, computed again, or of a rejected draft.
    if not job:
        rejected = totals.drafted_tokens - totals.accepted_tokens
        answers = sum(max(len(tokens) - 1, 0) for tokens, *_ in outcome.values.values())
        assert 0 <= totals.prompt_tokens + answers + rejected - outcome.rows <= len(requests(model))


@pytest.mark.parametrize(
    ("model", "draft", "job"),
    [
        ("llama3", "none", {"max_num_seqs": 1}),
        ("llama3", "q4_0", {}),
        ("qwen2_window", "none", {"kv_blocks": TIGHT}),
        ("deepseek_v3", "none", {"streams": True}),
        ("qwen3_moe", "none", {"max_num_batched_tokens": 50}),
        ("llama_mixed.gguf", "none", {}),
        ("llama_mixed.gguf", "q4_0", {}),
    ],
)
def test_a_draft_model(model: str, draft: str, job: dict[str, Any]) -> None:
    outcome = run(model, **job, speculation="always", draft=draft)
    assert_same(model, outcome)
    totals = outcome.totals
    assert totals.drafted["model"] >= totals.accepted["model"] > 0
    assert rank_statistics(outcome.session).memory["draft"] > 0
    if draft == "none":  # what differs is the KV cache, in f16
        assert totals.accepted["model"] > totals.drafted["model"] / 2


def test_drafts_from_finished_answers() -> None:
    """Requests that are asked again, one after the other, are drafted from their first answers."""
    some = [one for one in requests("llama3") if one.id.startswith("long")]
    again = [replace(one, id=f"{one.id} again") for one in some]
    outcome = run("llama3", [*some, *again], max_num_seqs=1, speculation="always")
    assert outcome.totals.accepted["answers"] > len(some)
    for one in some:
        assert (
            outcome.values[one.id, 0] == outcome.values[f"{one.id} again", 0] == expected("llama3")[one.id, 0]
        )


@pytest.mark.parametrize("model", ["qwen3_next", "nemotron_h"])
def test_models_with_states_draft_nothing(model: str) -> None:
    outcome = run(model, speculation="prompt-lookup")
    assert outcome.totals.drafted_tokens == 0
    assert_same(model, outcome)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_another_order_and_everything_else_too(model: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shuffled = [requests(model)[i] for i in rng.permutation(len(requests(model)))]
    job = {
        "max_num_seqs": int(rng.integers(2, 12)),
        "max_num_batched_tokens": int(rng.integers(12, 200)),
        "threads": int(rng.integers(1, 4)),
        "kv_blocks": int(rng.integers(TIGHT, 12)),
        "prefix_sharing": bool(rng.integers(2)),
        "speculation": ("auto", "always", "prompt-lookup")[seed % 3],
    }
    assert_same(model, run(model, shuffled, **job))


@pytest.mark.parametrize(("model", "draft"), [*((model, None) for model in MODELS), ("llama3", "none")])
def test_broken_off_and_gone_on_from_what_was_saved(model: str, draft: str | None) -> None:
    """Log-probabilities, echoes, penalties and draws of a saved part are those of a run that was never broken off."""
    job = {"max_num_seqs": 9 if draft is None else 2, "speculation": "always", "draft": draft}
    outcome = harness.run_in_pieces(world(), harness.path_of(model), requests(model), seed=1, **job)
    assert_same(model, outcome)
    whole = sum(len(value[0]) for value in expected(model).values())
    assert whole <= outcome.totals.generated_tokens
    if draft is None:  # with it a piece may come to the end of all that it has begun
        assert outcome.totals.generated_tokens < 1.4 * whole
        assert outcome.totals.recomputed_tokens > 0


def test_what_was_saved_to_its_last_token_is_not_computed_again() -> None:
    some = [one for one in requests("llama3") if one.kind == "generate" and one.max_tokens]
    ended = {}
    for one in some:
        tokens, _, _, logprobs, top, prompt_logprobs, prompt_top, _ = expected("llama3")[one.id, one.choice]
        partial = PartialCompletion(
            tokens=tokens, logprobs=logprobs, top=top, prompt_logprobs=prompt_logprobs, prompt_top=prompt_top
        )
        ended[one.id, one.choice] = replace(one, resumed=partial)
    outcome = run("llama3", list(ended.values()))
    assert outcome.totals.steps == outcome.rows == 0
    assert_same("llama3", outcome, some)
    some_more = [requests("llama3")[0], *ended.values()]
    assert_same("llama3", run("llama3", some_more), some_more)
