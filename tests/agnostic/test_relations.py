"""What a batch costs, in counts that no clock decides: rows, steps, uses of layers."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from mpillm import kernels
from mpillm.engine.request import Request
from mpillm.kernels import reference
from tests.agnostic import test_same_bits
from tests.agnostic.test_same_bits import TIGHT, requests

MODEL = "llama3"
run = functools.partial(test_same_bits.run, speculation="off")


@pytest.mark.parametrize("kv_blocks", [0, TIGHT])
@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("model", ["llama3", "llama_mixed.gguf"])
def test_every_row_is_accounted_for(model: str, prefix_sharing: bool, kv_blocks: int) -> None:
    outcome = run(model, prefix_sharing=prefix_sharing, kv_blocks=kv_blocks)
    totals = outcome.totals
    assert totals.prompt_tokens + totals.shared_tokens == sum(len(one.prompt) for one in requests(model))
    generated = [len(tokens) for tokens, *_ in outcome.values.values()]
    assert totals.generated_tokens == sum(generated)
    # The last token of an answer goes through no layer.
    later = sum(count - 1 for count in generated if count)
    assert outcome.rows == totals.prompt_tokens + totals.recomputed_tokens + later
    if not kv_blocks:
        assert totals.recomputed_tokens == totals.preemptions == 0


def alike(count: int, prompt: int, max_tokens: int, shared: int) -> list[Request]:
    """Prompts that share their first `shared` tokens."""
    common = tuple(range(shared))
    return [
        Request(str(i), (*common, 100 + i, *range(prompt - shared - 1)), max_tokens=max_tokens)
        for i in range(count)
    ]


def test_a_shared_prefix_is_computed_once() -> None:
    count, prompt, shared = 16, 80, 70  # two full blocks of it
    outcome = run(MODEL, alike(count, prompt, 1, shared))
    assert outcome.totals.shared_tokens == (count - 1) * 64
    assert outcome.rows == count * prompt - (count - 1) * 64
    assert outcome.totals.steps == 2  # the first one's prompt; all the others' own tokens
    alone = run(MODEL, alike(count, prompt, 1, shared), prefix_sharing=False)
    assert alone.rows == count * prompt
    assert alone.totals.steps == -(-count * prompt // 512)


def test_steps_and_uses_of_layers_do_not_grow_with_the_batch() -> None:
    outcomes = [run(MODEL, alike(count, 10, 9, 0)) for count in (1, 5, 30)]
    assert [outcome.totals.steps for outcome in outcomes] == [9, 9, 9]
    assert [outcome.totals.peak_sequences for outcome in outcomes] == [1, 5, 30]
    assert len({outcome.uses for outcome in outcomes}) == 1


def test_what_is_streamed_for_a_token_falls_as_the_batch_grows() -> None:
    loaded = []
    for count in (1, 16, 300):  # the last is more than a step takes while nothing is streamed
        some = [Request(str(i), (i // 100, i % 100, *range(8)), max_tokens=9) for i in range(count)]
        outcome = run(MODEL, some, streams=True)
        assert (outcome.totals.steps, outcome.totals.peak_sequences) == (9, count)
        cache = outcome.session.weights.cycle
        fixed = cache.total - cache.streamed
        read_ahead = cache.counters.loaded - fixed - 9 * cache.streamed
        assert 0 <= read_ahead <= cache.budget - fixed
        loaded.append(cache.counters.loaded / outcome.totals.generated_tokens)
    for tokens, count in zip(loaded, (1, 16, 300), strict=True):
        assert tokens * count == pytest.approx(loaded[0], rel=0.12)  # what was read ahead at the end


def test_a_steps_kernel_calls_do_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(name: str) -> Any:
        call = getattr(kernels, name)

        @functools.wraps(call)
        def counted(*args: Any, **more: Any) -> Any:
            calls.append(name)
            return call(*args, **more)

        return counted

    loading = {"pack", "packed_nbytes", "dequantize"}
    for name in set(reference.__all__) & set(kernels.__all__) - loading:
        monkeypatch.setattr(kernels, name, counting(name))
    made = {}
    for count in (1, 30):
        calls.clear()
        outcome = run("llama_mixed.gguf", alike(count, 10, 4, 0))
        assert outcome.totals.steps == 4
        made[count] = sorted(calls)
    assert made[1] == made[30] != []
