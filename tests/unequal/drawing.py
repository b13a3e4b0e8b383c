"""What is drawn for a run on unequal ranks: its layout, budgets, threads and sizes, and who dies where."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mpillm import spec
from mpillm.kernels import KV_BLOCK
from mpillm.planning import hosts as speeds
from mpillm.planning import plan
from mpillm.planning.hosts import Host
from tests.unequal.rank import HANG, Death

LAYERS = 6  # of the model, which can be cut into two shards
# Replicas, stages and shards, by the number of ranks.
SHAPES = {
    2: ((1, 2, 1), (1, 1, 2), (2, 1, 1)),
    3: ((3, 1, 1), (1, 3, 1)),
    4: ((2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (4, 1, 1)),
    6: ((3, 2, 1), (3, 1, 2), (2, 3, 1), (1, 3, 2), (1, 6, 1)),
    8: ((2, 2, 2), (2, 2, 2), (4, 1, 2), (2, 4, 1), (1, 4, 2)),
}
# Points at which ranks die (see `rank.py`), and up to how often they come there before.
STEPS = {"step": 60, "sum": 300, "stand": 3}
POINTS = STEPS | {
    "meet": 1, "begin": 1, "layout": 1, "measure": 1, "model": 1, "worker": 1, "made": 2, "give": 2, "get": 3,
    "part": 1, "again": 1, "check": 1, "count": 1, "wait": 1, "write": 1, "finish": 1, "end": 1,
}  # fmt: skip
# The same for those that die after others.
LATER = {
    "begin": 2, "layout": 2, "model": 2, "worker": 2, "made": 4, "opened": 1, "again": 1, "regroup": 1, "shrink": 1,
}  # fmt: skip


def deaths_of(draw: random.Random, ranks: int, points: dict[str, int] = POINTS) -> list[Death]:
    """None to three deaths; at least one rank lives."""
    count = draw.choice((0, 1, 1, 1, 2, 2, 3))
    made = list[Death]()
    for victim in draw.sample(range(ranks), min(count, max(ranks - 1, 1))):
        at = LATER if made and draw.random() < 0.5 else points
        point = draw.choice(["step"] * 2 + sorted(at)) if at is points else draw.choice(sorted(at))
        signal = "SIGKILL" if draw.random() < 0.9 or point not in STEPS else draw.choice(("SIGSTOP", HANG))
        made.append(Death(victim, point, draw.randint(1, at[point]), signal))
    return made


def settings_of(
    draw: random.Random, ranks: int, names: Sequence[str], model: Path, folder: Path, served: bool = False
) -> list[str]:
    """A layout, budgets, threads and sizes for ranks on hosts of these names: nothing that changes a byte."""
    found = list[str]()
    shapes = [shape for shape in SHAPES.get(ranks, ()) if shape[0] == 1 or not served]
    if shapes and draw.random() < 0.75:
        replicas, stages, shards = draw.choice(shapes)
        found += [f"layout.replicas={replicas}", f"layout.stages={stages}", f"layout.shards={shards}"]
    elif draw.random() < 0.5 and not served:
        found.append("layout.replicas=1")
    one = plan.make(spec.load(None, [], model=str(model), input="in", output="out"), 1).ranks[0]
    block = KV_BLOCK * one.kv_token
    little, some = one.weights_minimum, (one.weights_minimum + one.weights_share) // 2
    for key, values in (
        ("memory.kv", [24 * block, 40 * block, 400 * block]),
        ("memory.weights", ["all", "all", little, some]),
        ("layout.threads", [1, 1, 2]),
    ):
        if draw.random() < 0.7:
            found.append(f"{key}={_by_rank_or_host(draw, ranks, names, values)}")
    if draw.random() < 0.2:
        hosts = [Host("8GiB", products={"f32": [draw.choice((0.01, 0.03))] * 3}) for _ in range(ranks)]
        speeds.write(folder / "speeds.toml", hosts)
        found.append(f"layout.hosts={folder / 'speeds.toml'}")
    found.append(f"batch.max_num_seqs={draw.choice((1, 2, 4, 16))}")
    found.append(f"batch.max_num_batched_tokens={draw.choice((16, 33, 256))}")
    found.append(f"batch.speculation={draw.choice(('off', 'auto', 'prompt-lookup'))}")
    if not served:
        found.append(f"job.checkpoint_tokens={draw.choice((0, 1, 5, 64))}")
    return found


def _by_rank_or_host(draw: random.Random, ranks: int, names: Sequence[str], values: list[Any]) -> str:
    """A list with a value for each rank, or a table with one for some of the hosts."""
    if draw.random() < 0.5:
        return msgspec.json.encode([draw.choice(values) for _ in range(ranks)]).decode()
    own = [*draw.sample(names, draw.randint(0, len(names))), "default"]
    table = [f"{name} = {msgspec.json.encode(draw.choice(values)).decode()}" for name in own]
    return f"{{{', '.join(table)}}}"
