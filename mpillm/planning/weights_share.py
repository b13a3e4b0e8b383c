"""Compute the weights that a rank holds and streams, and its work in a step."""

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
    """The bytes of weights of a rank, and its work in a step."""

    total: int  # all weights of the rank
    held: int  # the maximum in memory
    beyond: int  # additional bytes of buffers
    minimum: int  # the smallest budget that works
    streamed: int  # read from disk for each step
    pages: Sequence[int]  # the bytes of each page
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
    """Return the work in a step of the rank at `place`, which has `pages` and `cache`.

    The rank streams `streamed` bytes of weights, `streamed_experts` of them of experts, in pages of `page` bytes on
    average. `made` bytes of weights are packed in memory before the first step.
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
    stackable = all(layer.stackable(place) for layer in config.layers)
    # For each row and each token that it attends to: 2 operations for each value of all heads, for keys and for values.
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
        apart=bool(streamed or counts["expert"]) or not stackable,
        streamed_part=0.0 if counts["expert"] else min(streamed / max(page * len(pages), 1.0), 1.0),
        stacked=not (streamed or config.whole_prompts) and stackable,
    )


def weights_share(
    spec: Spec,
    config: ModelConfig,
    place: Place,
    pages: Sequence[PagePlan],
    cache: CacheLayout,
    in_file: Callable[[PageTensor], bool],
) -> WeightsShare:
    """Return the weights of the rank at `place`, which has `pages`.

    `in_file` says whether a tensor can be used as it is in its file.
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
