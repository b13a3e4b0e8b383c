"""Models that classify or make vectors against transformers: alone, under a small budget, and in any batch."""

from __future__ import annotations

from contextlib import closing

import pytest

from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.weights.paging.weights import minimum_budget
from mpillm.weights.source import rank_plans
from tests.model import pooled
from tests.model.engine_harness import run_engine


@pytest.mark.parametrize("name", pooled.NAMES)
def test_pooled_states_and_logits(name: str) -> None:
    model, prompts = pooled.FOLDER / name, pooled.golden(name)
    requests = pooled.requests_of(prompts)
    exact = {"activations": "f32", "kv_type": "f32"}
    completions = run_engine(model, requests, **exact)
    pooled.check(prompts, completions, pooled.classifier_of(model))
    with closing(open_source(model)) as source:
        plans = rank_plans(config_of(source), Place(0, 1, 1), source)
    others = (
        run_engine(model, requests, **exact, weights=minimum_budget(plans)),
        run_engine(model, requests[::-1], **exact, max_num_seqs=2)[::-1],
        [run_engine(model, [request], **exact)[0] for request in requests[-3:]],
    )
    for other in others:
        assert list(map(pooled.bits, other)) == list(map(pooled.bits, completions[-len(other) :]))
