"""Format a plan as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from mpillm.planning.layout import shapes_in_words
from mpillm.planning.limits import step_description
from mpillm.planning.plan import Plan
from mpillm.planning.rank_plan import RankPlan
from mpillm.spec import shown_bytes
from mpillm.words import count_of, enough, listed, some_of

COLUMNS, LABEL = 80, 10  # the width of the text, and of the labels at the left
WORTH = 1.03  # the smallest gain that gets a line
MANY = 64  # ranks; of more of them, those that take the same memory share a row
_AT_TIMES = ("read", "adapters", "draft")  # columns that few plans need


def as_text(plan: Plan) -> str:
    """Return the plan as text, whose sentences fit a terminal of 80 columns."""
    parts = (map(_wrapped, _sentences(plan)), _rank_table(plan), _verdict(plan))
    return "\n\n".join("\n".join(part) for part in parts)


def _wrapped(line: str, indent: int = LABEL) -> str:
    return textwrap.fill(
        line,
        COLUMNS,
        subsequent_indent=" " * indent,
        break_long_words=not line.startswith("model"),  # users copy the path
        break_on_hyphens=False,
    )


def _sentences(plan: Plan) -> Iterator[str]:
    ranks = len(plan.ranks)
    others = [pair for pair in plan.layouts if pair != (plan.stages, plan.shards)]
    yield f"model     {plan.model} ({plan.architecture})"
    yield f"weights   {', '.join(plan.weights)}"
    if plan.missing_nbytes:
        yield f"          {shown_bytes(plan.missing_nbytes)} are missing in the file: fetch them before the run"
    yield f"layout    {_layouts(plan)} on {count_of(ranks, 'rank')}"
    if plan.replicas > 1:
        yield f"          {plan.reason}"
    if plan.compared:
        yield f"          {plan.compared}"
    if plan.left_out:
        yield f"          left out, because they would slow the run down: {some_of(plan.left_out, 'host')}"
    for sentence in plan.in_reserve:
        yield f"          {sentence}"
    possible = [_layout(*pair) for pair in others]
    if plan.replicas > 1:
        possible += [f"one replica of {_layout(*pair)}" for pair in plan.layouts_of_all]
    if possible:
        yield f"          also possible: {'; '.join(possible)}"
    contexts = plan.kv_tokens / plan.max_context
    yield (
        f"KV cache  {plan.kv_type}, holds {count_of(plan.kv_tokens, 'token')}: {contexts:.1f} requests of "
        f"{plan.max_context} tokens at once"
    )
    if in_file := max(rank.kv_in_file for rank in plan.ranks):
        yield (
            f"          {plan.kv_tokens_in_memory} in memory; beyond, up to {shown_bytes(in_file)} a rank on disk"
        )
    minimum, streamed = (
        max(getattr(rank, key) for rank in plan.ranks) for key in ("weights_minimum", "weights_streamed")
    )
    yield "batch     " + step_description(plan.step_sequences, plan.step_tokens, streamed)
    total = sum(plan.wire.values())
    if total:
        parts = ", ".join(f"{kind} {count:.0f}" for kind, count in plan.wire.items() if count)
        saved = 100 * (1 - total / plan.wire_f32)
        less = f"; {saved:.1f} % less than float32" if saved else ""
        yield f"wire      {total:.0f} bytes per token, all ranks together ({parts}{less})"
    if plan.wire_of_shards:
        yield f"          {plan.wire_of_shards}"
    yield from _time(plan)
    yield f"memory    of each rank, at most, in MiB; memory.weights must be at least {enough(minimum)}"
    if streamed:
        yield "          read: weights that each step reads from disk"


def _rank_table(plan: Plan) -> Iterator[str]:
    """Yield a row for each rank; of many ranks, a row for those that take the same memory."""
    many = len(plan.ranks) > MANY
    groups: dict[tuple[str, ...], list[RankPlan]] = {}
    for rank in plan.ranks:
        own = () if many else (str(rank.rank),)
        groups.setdefault((*own, *map(_mib, _memory(rank).values())), []).append(rank)
    columns: dict[str, list[str]] = {}
    for ranks in groups.values():
        cells = {
            **({"ranks": str(len(ranks))} if many else {"rank": str(ranks[0].rank)}),
            "replica": _span([rank.replica for rank in ranks]),
            "stage": _span([rank.stage for rank in ranks]),
            "shard": _span([rank.shard for rank in ranks]),
            "layers": f"{min(rank.layers[0] for rank in ranks)}-{max(rank.layers[1] for rank in ranks) - 1}",
            **{name: _mib(nbytes) for name, nbytes in _memory(ranks[0]).items()},
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    unused = {name for name in _AT_TIMES if not any(_memory(rank)[name] for rank in plan.ranks)}
    if plan.replicas == 1:
        unused.add("replica")
    rows = [[name, *cells] for name, cells in columns.items() if name not in unused]
    widths = [max(map(len, column)) for column in rows]
    for row in zip(*rows, strict=True):
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    if many:
        yield "Ranks that take the same memory share a row; --json lists each."


def _memory(rank: RankPlan) -> dict[str, int]:
    """Return the bytes of a rank by the names of the table's columns."""
    return {
        "weights": rank.weights_held,
        "read": rank.weights_streamed,
        "adapters": rank.adapters,
        "draft": rank.draft,
        "KV": rank.kv_held,
        "rows": rank.activations,
        "process": rank.process,
        "in all": rank.held,
    }


def _span(numbers: list[int]) -> str:
    """Return the smallest and the largest of the numbers."""
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"


def _verdict(plan: Plan) -> Iterator[str]:
    together = shown_bytes(sum(rank.held for rank in plan.ranks))
    on_one = f" On one machine all ranks need {together}." if len(plan.ranks) > 1 else ""
    fits = f"It fits if every rank has the free memory of its last column.{on_one}"
    if plan.free:
        rank, free = max(zip(plan.ranks, plan.free, strict=True), key=lambda pair: pair[0].held / pair[1])
        who = f"rank {rank.rank} needs the largest part, " if len(plan.ranks) > 1 else ""
        fits = f"It fits into the free memory: {who}{shown_bytes(rank.held)} of {shown_bytes(free)}.{on_one}"
    yield from (_wrapped(sentence, indent=0) for sentence in plan.problems or [fits])


def _time(plan: Plan) -> Iterator[str]:
    """Yield the time of the job, what limits it, and what would make it faster."""
    time = plan.time
    known = "measured speeds" if time.measured else "assumed speeds: mpillm doctor --output measures them"
    sequences = count_of(time.requests, "sequence")
    tokens = f"{sequences}, about {count_of(time.prompt_tokens, 'prompt token')} and up to {time.generated_tokens} more"
    yield f"time      {_duration(time.seconds)} for {'the input:' if time.of_input else 'an input of'}"
    yield f"          {tokens}"
    yield f"          ({known})"
    yield (
        f"          {time.rate:.1f} tokens/s; prompts alone {time.prefill:.1f}, answers alone {time.decode:.1f}, "
        f"one answer {time.decode_one:.1f}"
    )
    together = f" in {time.micro_batches} micro-batches" if time.micro_batches > 1 else ""
    at_once = count_of(
        max(time.sequences // plan.replicas, 1), "sequence"
    )  # some replicas may get no request
    yield f"          a step of {at_once}{together} takes {_step(time.step)}; its limit: {time.limit}"
    if plan.stages > 1:
        yield f"          slowest: {time.slowest}; stages wait {100 * time.bubble:.0f} % of a step for each other"
    for name, gain in plan.gains.items():
        if gain > WORTH:
            yield f"          {gain:.2f} times as fast with {name}"
    if same := [name for name, gain in plan.gains.items() if gain <= WORTH]:
        yield f"          no faster with {listed(same, 'or')}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"


def _step(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _layouts(plan: Plan) -> str:
    """Return the replicas, grouped by their stages and shards."""
    shapes = dict[
        int, tuple[int, int]
    ]()  # for each replica: 1 more than the stage and shard of its last rank
    for rank in plan.ranks:
        shapes[rank.replica] = rank.stage + 1, rank.shard + 1
    return shapes_in_words(list(shapes.values()))


def _layout(stages: int, shards: int) -> str:
    return shapes_in_words([(stages, shards)])
