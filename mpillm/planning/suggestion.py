"""The least memory with which a job reaches a given rate, as a job file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
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
from mpillm.planning.rank_plan import RankPlan
from mpillm.spec import UNREAD, OutputSection, Spec, shown_bytes
from mpillm.words import count_of

MIB = 2**20


def job_file(spec: Spec, machines: Machines, rate: float) -> str:
    """Return the text of a job file with the least memory.weights for `rate` tokens/s.

    Raises JobError if no memory is enough, MpillmError if the model cannot be read.
    """
    with (
        closing(open_described(models.path_to_plan(spec.model_on(gethostname())), spec.quantize)) as source,
        with_adapters(spec.adapters, source) as config,
    ):
        asked, planner = needs_of(spec, config, source), Planner(source, config)

        def made(weights: int | str) -> tuple[float, list[RankPlan]]:
            job = msgspec.structs.replace(spec, memory=msgspec.structs.replace(spec.memory, weights=weights))
            found = laid_out(job, planner, machines, asked)
            return found.time.rate, [rank for plan in found.plans for rank in plan.ranks]

        best, ranks = made("all")
        low, high = (
            max(getattr(rank, key) for rank in ranks) for key in ("weights_minimum", "weights_share")
        )
        if best < rate:
            raise JobError(
                f"No amount of memory gives {rate:g} tokens/s on {count_of(machines.ranks, 'rank')}: with "
                f"all weights in memory the rate is {best:.1f}; use more or faster hosts."
            )
        low, high = -(-low // MIB), -(-high // MIB)
        while low < high:  # the least number of MiB that is fast enough
            middle = (low + high) // 2
            low, high = (low, middle) if made(middle * MIB)[0] >= rate else (middle + 1, high)
        found, ranks = made(high * MIB)
    held = shown_bytes(max(rank.held for rank in ranks))
    values = msgspec.to_builtins(spec)
    if spec.input == UNREAD:
        values["input"] = "requests.jsonl"
    values["memory"]["weights"] = f"{high}MiB"
    said = f"# {found:.1f} tokens/s on {count_of(machines.ranks, 'rank')}; a rank takes up to {held} in all."
    usual = msgspec.to_builtins(Spec(model="", input="", output=OutputSection(path="")))
    if spec.output == OutputSection(path=spec.output.path):
        values["output"] = spec.output.path
    return "\n".join([said, *_toml_lines(values, usual)])


def _toml_lines(values: dict[str, Any], usual: dict[str, Any]) -> Iterator[str]:
    """A job file with what is not as usual; tables come after all else."""
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
    """A value; null is said nowhere in TOML, and means the same as no entry."""
    if isinstance(value, dict):
        entries = (f"{json.dumps(key)} = {_toml(own)}" for key, own in value.items() if own is not None)
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)
