"""How much work a step is, in counts: what makes batches fast is that more sequences are no more products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mpillm import kernels
from mpillm.bench import synthetic, synthetic_shapes
from mpillm.engine.request import Request
from mpillm.model.config import ModelConfig
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.weights.paging.experts import ExpertCache, minimum_budget
from mpillm.weights.source import rank_plans
from tests.model.engine_harness import run_engine
from tests.model.golden import model_path

MORE = 4  # steps


def steps(monkeypatch: pytest.MonkeyPatch, name: str, sequences: int) -> tuple[list[Any], int]:
    """The prepared pieces of work that MORE steps of decoding do, in their order, and how often threads were called."""
    found = []
    for tokens in (2, 2 + MORE):
        done: list[Any] = []
        compute = kernels.compute

        def counting(
            work: Any, *args: Any, done: list[Any] = done, compute: Any = compute, **named: Any
        ) -> None:
            done.append(work)
            compute(work, *args, **named)

        requests = [Request(id=str(i), prompt=(3 + i, 5), max_tokens=tokens) for i in range(sequences)]
        before = kernels._compiled.regions() if kernels._compiled else 0
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "compute", counting)
            run_engine(model_path(name), requests)
        found.append((done, kernels._compiled.regions() - before if kernels._compiled else 0))
    (few, before), (many, after) = found
    return many[len(few) :], after - before


def bytes_read(model: Path, sequences: int) -> int:
    """Bytes of matrices that MORE steps of decoding pass through."""
    read = []
    for tokens in (2, 2 + MORE):
        requests = [Request(id=str(i), prompt=(3 + i, 5), max_tokens=tokens) for i in range(sequences)]
        before = kernels._compiled.weights_read()
        run_engine(model, requests, max_num_seqs=sequences)
        read.append(kernels._compiled.weights_read() - before)
    return read[1] - read[0]


def matrix_bytes(model: Path) -> tuple[int, int]:
    """Bytes of all matrices that every token passes through, and of those of one layer's expert."""
    with closing(open_source(model)) as source:
        config = config_of(source)
        plans = rank_plans(config, Place(0, 1, 1), source)
        each = [(plan.expert, sum(entry.nbytes for entry in plan.entries if entry.bounds)) for plan in plans]
    return sum(size for expert, size in each if expert < 0), max(
        (size for expert, size in each if expert >= 0), default=0
    )


def config(name: str) -> ModelConfig:
    with closing(open_source(model_path(name))) as source:
        return config_of(source)


def test_all_layers_of_a_step_are_one_call_for_any_number_of_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few rows take several layers as one region of the threads."""
    layers = config("mistral").n_layers
    one, regions = steps(monkeypatch, "mistral", 1)
    eight, regions_of_eight = steps(monkeypatch, "mistral", 8)
    kinds = Counter(type(work).__name__ for work in one)
    assert kinds == {"LayerStack": MORE, "Products": MORE}
    assert Counter(type(work).__name__ for work in eight) == kinds
    # Beside them: embeddings, the final norm, candidates and log-sum-exp of the logits.
    assert regions <= MORE * (-(-layers // 16) + 5)
    assert regions_of_eight <= MORE * (-(-layers // 2) + 5)


def test_a_layers_experts_are_one_piece_of_work_for_any_number_of_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixtures = sum(layer.mlp.count > 0 for layer in config("qwen3_moe").layers)
    ready_groups = ExpertCache.ready_groups

    def when_all_are_there(cache: ExpertCache[Any], pages: Sequence[int]) -> Iterator[list[Any]]:
        with cache._changed:
            cache._changed.wait_for(lambda: cache.counters.loads == len(cache.pages))
        return ready_groups(cache, pages)

    monkeypatch.setattr(ExpertCache, "ready_groups", when_all_are_there)
    one, regions = steps(monkeypatch, "qwen3_moe", 1)
    eight, regions_of_eight = steps(monkeypatch, "qwen3_moe", 8)
    kinds = Counter(type(work).__name__ for work in one)
    assert Counter(type(work).__name__ for work in eight) == kinds
    assert kinds["Experts"] == MORE * mixtures
    assert regions == regions_of_eight


@pytest.mark.skipif(kernels._compiled is None, reason="only the compiled kernels count what they read")
@pytest.mark.parametrize("weights", ["q4_0", "q8_0", "q4_k_m", "bf16"])
def test_a_step_reads_each_byte_of_weights_once_for_any_number_of_sequences(
    weights: str, tmp_path: Path
) -> None:
    model = tmp_path / "wide.gguf"  # as wide a feed-forward part as a 1B model's: rows of x outgrow a cache
    synthetic.write(model, "wide", synthetic_shapes.Shape("llama", 256, 2, 4, 2, 64, 8192, 1024), weights)
    every, _ = matrix_bytes(model)
    assert bytes_read(model, 1) == bytes_read(model, 32) == MORE * every


@pytest.mark.skipif(kernels._compiled is None, reason="only the compiled kernels count what they read")
def test_of_experts_a_step_reads_those_that_were_chosen(tmp_path: Path) -> None:
    shape = synthetic_shapes.SHAPES["tiny-moe"]
    model = tmp_path / "moe.gguf"
    synthetic.write(model, "moe", shape, "q4_0")
    every, expert = matrix_bytes(model)
    chosen = [(bytes_read(model, sequences) - MORE * every) / expert for sequences in (1, 8)]
    assert chosen[0] == MORE * shape.layers * shape.experts_used
    assert chosen[0] < chosen[1] <= MORE * shape.layers * shape.experts
    assert chosen[1] == int(chosen[1])


def test_experts_of_the_next_layer_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where experts are streamed, guesses at those of each layer but the first are made once a step; the bytes stay."""
    model = model_path("qwen3_moe")
    with closing(open_source(model)) as source:
        config = config_of(source)
        plans = rank_plans(config, Place(0, 1, 1), source)
    guessed: list[list[int]] = []
    expect = ExpertCache.expect

    def noting(cache: ExpertCache[Any], pages: Sequence[int]) -> None:
        guessed.append([cache.pages[page].layer for page in pages])
        expect(cache, pages)

    monkeypatch.setattr(ExpertCache, "expect", noting)
    requests = [Request(id="0", prompt=(3, 5), max_tokens=MORE)]
    whole = run_engine(model, requests)
    assert not guessed
    budget = sum(plan.nbytes for plan in plans if plan.expert < 0) + minimum_budget(
        [plan for plan in plans if plan.expert >= 0]
    )
    streamed = run_engine(model, requests, weights=budget)
    assert [done.tokens for done in streamed] == [done.tokens for done in whole]
    layers = [number for number, layer in enumerate(config.layers) if layer.mlp and layer.mlp.count]
    foreseen = [layer for layer in layers if layer]
    assert [set(made) for made in guessed] == [{layer} for layer in foreseen] * MORE
    chosen = {len(made) for made in guessed[len(foreseen) :]}  # one row each
    assert chosen == {2}
