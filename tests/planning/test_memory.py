"""What is planned for what a rank knows of a model, beside what Python counts."""

from __future__ import annotations

import gc
import tracemalloc
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from mpillm.bench import synthetic
from mpillm.bench.synthetic_shapes import SHAPES
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.planning import plan
from mpillm.planning.memory import STREAMING, loaded_model
from mpillm.spec import load
from mpillm.weights.io.reading import HUGE
from mpillm.weights.paging.weights import beyond_budget
from mpillm.weights.source import rank_plans


def test_what_is_known_of_many_experts_is_planned(tmp_path: Path) -> None:
    shape = replace(SHAPES["qwen3-30b-a3b"], hidden=64, layers=8, heads=8, head_dim=32, ffn=32, vocab=256)
    synthetic.write(path := tmp_path / "experts.gguf", "experts", shape, "q4_0")
    open_source(path).close()  # what is loaded once is not counted
    gc.collect()
    tracemalloc.start()
    source = open_source(path)
    plans = rank_plans(config_of(source), Place(0, 1, 1), source)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plans) > 8 * 128
    assert used <= loaded_model(source, [0] * len(plans)) <= 2 * used
    source.close()


def test_the_ends_of_streamed_buffers_are_planned_beside_the_budget(tmp_path: Path) -> None:
    shape = replace(SHAPES["llama-1b"], hidden=512, layers=8, ffn=1024, heads=8, kv_heads=4, vocab=256)
    synthetic.write(path := tmp_path / "small.gguf", "small", shape, "bf16")
    with closing(open_source(path)) as source:
        pages = rank_plans(config_of(source), Place(0, 1, 1), source)
    budget = sum(page.nbytes for page in pages) // 2

    def process(*asked: str) -> int:
        given = ["memory.loader=read", *asked]  # whose threads keep their buffers, streamed or not
        return plan.make(load(None, given, model=str(path), input="in", output="out"), 1).ranks[0].process

    beyond = process(f"memory.weights={budget}") - process() - STREAMING
    assert budget > HUGE
    assert beyond == beyond_budget(pages, budget, "cycle") >= HUGE
