"""The least memory with which a job reaches a given rate, as a job file."""

from __future__ import annotations

import json
from contextlib import closing
from socket import gethostname

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
from mpillm.spec import UNREAD, Spec, shown_bytes
from mpillm.store.readable import count_of

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
                f"No memory makes it {rate:g} tokens/s on {count_of(machines.ranks, 'rank')}: with all weights in "
                f"memory it is {best:.1f}; use more or faster hosts."
            )
        low, high = -(-low // MIB), -(-high // MIB)
        while low < high:  # the least number of MiB that is fast enough
            middle = (low + high) // 2
            low, high = (low, middle) if made(middle * MIB)[0] >= rate else (middle + 1, high)
        found, ranks = made(high * MIB)
    held = shown_bytes(max(rank.held for rank in ranks))
    asked_of = "requests.jsonl" if spec.input == UNREAD else spec.input
    keys: dict[str, str | dict[str, str]] = {
        "model": spec.model,
        "input": asked_of,
        "output": spec.output.path,
    }
    return "\n".join(
        [
            f"# {found:.1f} tokens/s on {count_of(machines.ranks, 'rank')}; a rank takes up to {held} in all.",
            *(f"{key} = {_toml(value)}" for key, value in keys.items()),
            *([f"quantize = {json.dumps(spec.quantize)}"] if spec.quantize != "none" else []),
            "",
            "[memory]",
            f'weights = "{high}MiB"',
            f"kv = {json.dumps(spec.memory.kv)}",
            *(["", "[adapters]"] if spec.adapters else []),
            *(f"{json.dumps(name)} = {json.dumps(path)}" for name, path in spec.adapters.items()),
        ]
    )


def _toml(value: str | dict[str, str]) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return f"{{{', '.join(f'{json.dumps(key)} = {json.dumps(own)}' for key, own in value.items())}}}"
