"""Find the least memory with which a job reaches a given rate, and write it as a job file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from socket import gethostname
from typing import Any

import msgspec

from mpillm.catalogue import models
from mpillm.errors import JobError
from mpillm.model.adapters import with_adapters
from mpillm.model.opening import open_described
from mpillm.planning.machines import Machines
from mpillm.planning.needs import needs_of
from mpillm.planning.plan import laid_out
from mpillm.planning.planner import Planner
from mpillm.planning.rank_plan import RankPlan, ReplicaPlan
from mpillm.spec import UNREAD, OutputSection, Spec, shown_bytes
from mpillm.words import count_of

MIB = 2**20


@dataclass(frozen=True)
class _Found:
    """A job, its rate in tokens/s, and the plans of its replicas."""

    spec: Spec
    rate: float
    measured: bool
    plans: Sequence[ReplicaPlan]

    @property
    def ranks(self) -> list[RankPlan]:
        return [rank for plan in self.plans for rank in plan.ranks]

    @property
    def held(self) -> int:
        """The bytes of the rank that holds most."""
        return max(rank.held for rank in self.ranks)

    @property
    def takes_longest(self) -> bool:
        """Whether the KV cache holds a request of the longest context, or the model keeps no tokens."""
        return all(
            not plan.caches[0].windows or plan.cached_tokens >= plan.max_context for plan in self.plans
        )


def job_file(spec: Spec, machines: Machines, rate: float) -> str:
    """Return the text of a job file with the least memory for `rate` tokens/s.

    JobError if no amount of memory is enough, MpillmError if the model cannot be read.
    """
    with (
        closing(open_described(models.path_to_plan(spec.model_on(gethostname())), spec.quantize)) as source,
        with_adapters(spec.adapters, source) as config,
    ):
        asked, planner = needs_of(spec, config, source), Planner(source, config)

        def made(weights: int | str, kv: int) -> _Found:
            memory = msgspec.structs.replace(spec.memory, weights=weights, kv=kv or spec.memory.kv)
            job = msgspec.structs.replace(spec, memory=memory)
            found = laid_out(job, planner, machines, asked)
            return _Found(job, found.time.rate, found.time.measured, found.plans)

        best = made("all", 0)
        if best.rate < rate:
            raise JobError(
                f"No amount of memory gives {rate:g} tokens/s on {count_of(machines.ranks, 'rank')}: with "
                f"all weights in memory the rate is {best.rate:.1f}; use more or faster hosts."
            )
        chosen = min(
            (_least_weights(made, kv, rate) for kv in _caches(made, best, rate)), key=lambda one: one.held
        )
    return _text(chosen, machines.ranks)


def _caches(made: Callable[[int | str, int], _Found], best: _Found, rate: float) -> Iterator[int]:
    """Yield the values of memory.kv to try, in bytes: that of the job (0), then half of it, a quarter, and so on."""
    yield 0
    kv = best.spec.memory.kv
    size = best.spec.memory.kv_bytes // 2 if isinstance(kv, (str, int)) else 0
    while size >= MIB:
        size = size // MIB * MIB
        found = made("all", size)
        if found.rate < rate or not found.takes_longest:
            return
        yield size
        size //= 2


def _least_weights(made: Callable[[int | str, int], _Found], kv: int, rate: float) -> _Found:
    """Return the job with the least memory.weights, in whole MiB, that is fast enough."""
    ranks = made("all", kv).ranks
    low, high = (
        -(-max(getattr(rank, key) for rank in ranks) // MIB) for key in ("weights_minimum", "weights_share")
    )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if made(middle * MIB, kv).rate >= rate else (middle + 1, high)
    return made(high * MIB, kv)


def _text(found: _Found, ranks: int) -> str:
    """Return the job file."""
    spec, speeds = found.spec, "measured" if found.measured else "assumed"
    said = (
        f"# {found.rate:.1f} tokens/s on {count_of(ranks, 'rank')} ({speeds} speeds); "
        f"at most {shown_bytes(found.held)} on a rank."
    )
    values = msgspec.to_builtins(spec)
    if spec.input == UNREAD:
        values["input"] = "requests.jsonl"
    for key in ("weights", "kv"):
        if isinstance(value := values["memory"][key], int):
            values["memory"][key] = f"{value // MIB}MiB" if value % MIB == 0 else value
    usual = msgspec.to_builtins(Spec(model="", input="", output=OutputSection(path="")))
    if spec.output == OutputSection(path=spec.output.path):
        values["output"] = spec.output.path
    return "\n".join([said, *_toml_lines(values, usual)])


def _toml_lines(values: dict[str, Any], usual: dict[str, Any]) -> Iterator[str]:
    """Yield a job file with the values that differ from the defaults; tables come last."""
    changed = {key: value for key, value in values.items() if value != usual[key]}
    tables = [
        key for key, value in changed.items() if isinstance(usual[key], dict) and isinstance(value, dict)
    ]
    for key, value in changed.items():
        if key not in tables:
            yield f"{key} = {_toml(value)}"
    for table in tables:
        yield f"\n[{table}]"
        known = usual[table]
        for key, value in changed[table].items():
            if key not in known or value != known[key]:
                yield f"{json.dumps(key) if table == 'adapters' else key} = {_toml(value)}"


def _toml(value: Any) -> str:
    """Return a value in TOML. TOML has no null, which means the same as no entry."""
    if isinstance(value, dict):
        entries = (f"{json.dumps(key)} = {_toml(own)}" for key, own in value.items() if own is not None)
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)
