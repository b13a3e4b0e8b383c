"""What one rank holds and streams of the weights, and what a step is for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpillm.kernels import BlockType
from mpillm.model.cache_layout import CacheLayout
from mpillm.model.config import ModelConfig
from mpillm.partition import grid
from mpillm.partition.grid import Place
from mpillm.planning.step_time import AttentionWork, RankWork
from mpillm.spec import Spec
from mpillm.weights.inventory import HEAD
from mpillm.weights.paging.weights import (
    beyond_budget,
    minimum_budget,
    streamed,
    streamed_experts,
    streamed_page,
)
from mpillm.weights.plan import PagePlan, PageTensor


@dataclass(frozen=True)
class WeightsShare:
    """What a rank holds of the weights, in bytes, and what a step is for it."""

    total: int
    held: int
    beyond: int  # what buffers take besides
    minimum: int
    streamed: int
    pages: Sequence[int]
    work: RankWork


def _work(
    config: ModelConfig,
    place: Place,
    pages: Sequence[PagePlan],
    cache: CacheLayout,
    streamed: int,
    streamed_experts: int,
    page: float,
    made: int,
) -> RankWork:
    """What a step is for the rank at `place`, which has `pages` and `cache`; it streams so many bytes of weights.

    `page` is the bytes of a page of them, and `made` those that are made ready in memory before.
    """
    counts: dict[str, Counter[BlockType]] = {"head": Counter(), "expert": Counter(), "layer": Counter()}
    values, attended = Counter[str](), 0
    for own in pages:
        kind = "head" if own.kind == HEAD else "expert" if own.expert >= 0 else "layer"
        for type, weights in own.values.items():
            counts[kind][type] += weights
        values[kind] += sum(entry.n + entry.k for entry in own.entries if entry.bounds)
        attended += sum(entry.k for entry in own.index.get("o", ()))
    attention = Counter[int]()
    for layer in filter(None, cache.tokens):
        attention[cache.windows[layer.group]] += 1
    layers = max(sum(attention.values()), 1)
    # For a row and one token before it: the width of all heads, once for the keys and once for the values.
    operations, nbytes = 4 * attended // layers, cache.token_nbytes // layers
    return RankWork(
        layers=len(grid.stage_layers(config.n_layers, place)),
        products=counts["layer"],
        experts=counts["expert"],
        head=counts["head"],
        expert_share=config.expert_share,
        streamed=streamed,
        streamed_experts=streamed_experts,
        attention=[AttentionWork(window, n * nbytes, n * operations) for window, n in attention.items()],
        values=values["layer"],
        experts_values=values["expert"],
        head_values=values["head"],
        page=page,
        made=made,
        apart=bool(streamed or counts["expert"] or place.shards > 1),
        streamed_part=0.0 if counts["expert"] else min(streamed / max(page * len(pages), 1.0), 1.0),
        stacked=not (streamed or config.whole_prompts) and all(layer.fused for layer in config.layers),
    )


def weights_share(
    spec: Spec,
    config: ModelConfig,
    place: Place,
    pages: Sequence[PagePlan],
    cache: CacheLayout,
    in_file: Callable[[PageTensor], bool],
) -> WeightsShare:
    """The share of the rank at `place`, which is responsible for `pages`.

    `in_file` says what can be used where it lies in its file.
    """
    total, budget = sum(page.nbytes for page in pages), spec.memory.weights_bytes
    read, made = streamed(pages, budget, spec.memory.policy), total
    if not read and spec.memory.loader != "read":
        made = sum(entry.nbytes for page in pages for entry in page.entries if not in_file(entry))
    return WeightsShare(
        total=total,
        held=total if budget is None else min(budget, total),
        beyond=beyond_budget(pages, budget, spec.memory.policy),
        minimum=minimum_budget(pages),
        streamed=read,
        pages=[page.nbytes for page in pages],
        work=_work(
            config,
            place,
            pages,
            cache,
            read,
            streamed_experts(pages, budget),
            streamed_page(pages, budget, spec.memory.policy),
            made,
        ),
    )
