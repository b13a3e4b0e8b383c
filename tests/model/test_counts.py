"""How much work a step is, in counts: what makes batches fast is that more sequences are no more products."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mpillm import kernels
from mpillm.comm.grid import Place
from mpillm.engine.sequence import Request
from mpillm.job.bench import synthetic
from mpillm.model.config import ModelConfig
from mpillm.weights.layer import rank_plans
from mpillm.weights.source import column_unit, open_source

from .engine_harness import run_engine
from .golden import model_path

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
        config = ModelConfig.from_dict(source.config)
        plans = rank_plans(config.shape(column_unit(source)), Place(0, 1, 1), source, config)
        each = [(plan.expert, sum(entry.nbytes for entry in plan.entries if entry.bounds)) for plan in plans]
    return sum(size for expert, size in each if expert < 0), max(
        (size for expert, size in each if expert >= 0), default=0
    )


def config(name: str) -> ModelConfig:
    with closing(open_source(model_path(name))) as source:
        return ModelConfig.from_dict(source.config, name)


def test_a_layer_of_a_step_is_two_pieces_of_work_for_any_number_of_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All layers are one call of Python's, and two regions of the threads each."""
    layers = config("mistral").n_layers
    one, regions = steps(monkeypatch, "mistral", 1)
    eight, regions_of_eight = steps(monkeypatch, "mistral", 8)
    kinds = Counter(type(work).__name__ for work in one)
    assert kinds == {"Layers": MORE, "Products": MORE}
    assert Counter(type(work).__name__ for work in eight) == kinds
    # Beside them: embeddings, the final norm, candidates and log-sum-exp of the logits.
    assert regions == regions_of_eight <= MORE * (2 * layers + 5)


def test_an_expert_is_computed_once_a_step_for_all_the_rows_that_chose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = config("qwen3_moe")
    for sequences in (1, 8):
        work, _ = steps(monkeypatch, "qwen3_moe", sequences)
        # What lies between two attentions is the router, and then the experts of one layer.
        chosen: list[list[int]] = [[]]
        for one in work:
            if isinstance(one, kernels.AttentionHalf):
                chosen.append([])
            elif isinstance(one, kernels.Expert):
                chosen[-1].append(id(one))
        assert all(len(set(experts)) == len(experts) for experts in chosen)
        most = min(shape.n_experts, sequences * shape.experts_per_token)
        assert max(map(len, chosen)) <= most
        assert sum(map(len, chosen)) <= MORE * sum(most if mixture else 1 for mixture in shape.moe_layers)


@pytest.mark.skipif(kernels._compiled is None, reason="only the compiled kernels count what they read")
@pytest.mark.parametrize("weights", ["q4_0", "q8_0", "q4_k_m", "bf16"])
def test_a_step_reads_each_byte_of_weights_once_for_any_number_of_sequences(
    weights: str, tmp_path: Path
) -> None:
    model = tmp_path / "wide.gguf"  # as wide a feed-forward part as a 1B model's: rows of x outgrow a cache
    synthetic.write(model, "wide", synthetic.Shape("llama", 256, 2, 4, 2, 64, 8192, 1024), weights)
    every, _ = matrix_bytes(model)
    assert bytes_read(model, 1) == bytes_read(model, 32) == MORE * every


@pytest.mark.skipif(kernels._compiled is None, reason="only the compiled kernels count what they read")
def test_of_experts_a_step_reads_those_that_were_chosen(tmp_path: Path) -> None:
    shape = synthetic.SHAPES["tiny-moe"]
    model = tmp_path / "moe.gguf"
    synthetic.write(model, "moe", shape, "q4_0")
    every, expert = matrix_bytes(model)
    chosen = [(bytes_read(model, sequences) - MORE * every) / expert for sequences in (1, 8)]
    assert chosen[0] == MORE * shape.layers * shape.experts_used
    assert chosen[0] < chosen[1] <= MORE * shape.layers * shape.experts
    assert chosen[1] == int(chosen[1])
