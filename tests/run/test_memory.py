"""What runs take, as the system counts it: in a memory cgroup of the planned size and a tenth, of a step's rows, of
pages that processes share; and what a slow disk does to them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import msgspec
import pytest

from mpillm import spec
from mpillm.bench import packed, synthetic, synthetic_shapes
from mpillm.partition.grid import Place
from mpillm.planning import plan
from mpillm.store import report, report_page
from tests.conftest import Mpi, run_bounded
from tests.run.cgroups import CGROUPS, SPARE, Cgroup

SHAPE = synthetic_shapes.Shape("llama", 1024, 16, 16, 4, 64, 4096, 16_000)  # 140 MiB in Q4_0
MIXTURE = synthetic_shapes.Shape("qwen3moe", 1024, 1, 16, 4, 64, 1024, 16_000, 16, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A model that is larger than Python, packed and as a GGUF file."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPILLM_CACHE", str(folder))
        patch.setitem(synthetic_shapes.SHAPES, "small", SHAPE)
        patch.setitem(synthetic_shapes.SHAPES, "flat", replace(SHAPE, layers=1))
        patch.setitem(synthetic_shapes.SHAPES, "flat-moe", MIXTURE)
        yield {
            "packed": packed.create("small", "q4_0", 1),
            "gguf": synthetic.create("small", "q4_0"),
            "flat": packed.create("flat", "q4_0", 1),
            "flat in floats": packed.create("flat", "bf16", 1),
            "mixture": packed.create("flat-moe", "q4_0", 1),
        }


def run(
    command: list[str], model: Path, folder: Path, *settings: str, prompt: int, count: int
) -> report.Report:
    """The report of a run of `command` with so many prompts of a length, each of which gets two tokens."""
    folder.mkdir()
    lines = [
        {"custom_id": str(i), "prompt": [(i * 31 + j * 7) % 16_000 for j in range(prompt)], "max_tokens": 2}
        for i in range(count)
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [f"--set={setting}" for setting in ("layout.threads=1", *settings)]
    arguments += [f"--model={model}", f"--input={folder / 'in.jsonl'}", f"--output={folder / 'out'}"]
    done = run_bounded([*command, "-m", "mpillm", "run", *arguments])
    assert done.returncode == 0, done.stderr
    return report.read(folder / "out")


def test_a_slow_disk_is_seen_in_the_report(models: dict[str, Path], tmp_path: Path) -> None:
    """The system lets the run read so many bytes a second: then most of it is waiting, and the report says so."""
    slow = 100 * 2**20
    device = os.stat(models["packed"]).st_dev
    try:
        own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        group = CGROUPS / "blkio" / own["blkio"][1:] / f"mpillm-test-{os.getpid()}"
        group.mkdir()
    except (OSError, KeyError) as error:
        pytest.skip(f"no block I/O cgroup can be made here (root can, with version 1): {error}")
    try:
        try:
            limit = f"{os.major(device)}:{os.minor(device)} {slow}"
            (group / "blkio.throttle.read_bps_device").write_text(limit)
        except OSError as error:
            pytest.skip(f"the disk of {models['packed']} cannot be slowed down: {error}")
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        made = run(
            ["sh", "-c", enter, "sh", sys.executable], models["packed"], tmp_path / "slow",
            "memory.weights=30MiB", "memory.loader=read", prompt=8, count=2,
        )  # fmt: skip
    finally:
        group.rmdir()
    (rank,) = made.ranks
    minimum = rank.weights["loaded"] / slow
    assert rank.weights["loaded"] > 200 * 2**20
    assert rank.seconds["compute"] + rank.seconds["weights"] > 0.8 * minimum
    assert minimum / 4 < rank.seconds["weights"] < made.seconds, (
        "what is not computed meanwhile is waited for"
    )
    assert rank.seconds["weights"] == rank.weights["stall_seconds"]
    assert f"{100 * made.waited_for_weights():.0f} % of the time." in "".join(report_page.summary(made))


@pytest.mark.parametrize("model", ["flat", "flat in floats", "mixture"])
def test_a_step_of_many_rows_takes_what_is_planned_for_them(
    models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    """The same prompt in a step of 4096 rows takes more than in steps of 512 by what the plan says, and not by half."""
    taken, planned = [], []
    for rows in (512, 4096):
        (rank,) = run(
            [sys.executable], models[model], tmp_path / str(rows),
            "memory.kv=16MiB", "memory.max_context=4608", f"batch.max_num_batched_tokens={rows}", prompt=4096, count=1,
        ).ranks  # fmt: skip
        assert rank.memory_peak <= sum(rank.memory.values())
        taken.append(rank.memory_peak - rank.kv["bytes"])
        planned.append(rank.memory["activations"])
    (few, many), (planned_few, planned_many) = taken, planned
    assert 0.5 < (many - few) / (planned_many - planned_few) <= 1


MAP = """
import sys
from pathlib import Path
from mpillm.partition.grid import Place
from tests.run.test_shared_files import content, paging
place = Place(*map(int, sys.argv[2:]))
with paging(Path(sys.argv[1]), "mmap", everything=True, place=place) as cache:
    for page in range(len(cache.pages)):
        content(cache, page)
    print("ready", flush=True)
    sys.stdin.read()
"""


def mapped_by(model: Path, places: list[Place]) -> tuple[int, int]:
    """Bytes of a model that processes at these places hold: each page counted by all that have it, and once."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MAP, str(model), *map(str, (place.rank, place.stages, place.shards))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for place in places
    ]
    try:
        for rank in ranks:
            assert _stream(rank.stdout).readline() == b"ready\n"
        own, shared = (sum(_mapped(rank.pid, model, kind) for rank in ranks) for kind in ("Rss", "Pss"))
    finally:
        for rank in ranks:
            rank.communicate()
    return own, shared


def test_jobs_share_the_pages_of_mapped_weights(models: dict[str, Path]) -> None:
    """Each process counts all pages as its own; there is one of each."""
    weights = sum(file.stat().st_size for file in models["packed"].glob("[lh]*.safetensors"))
    own, shared = mapped_by(models["packed"], [Place(0, 1, 1)] * 2)
    assert 1.95 * weights < own
    assert shared < 1.02 * weights


@pytest.mark.parametrize(("stages", "shards"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_ranks_of_a_node_hold_no_page_twice(models: dict[str, Path], stages: int, shards: int) -> None:
    """Their parts lie apart, so what plan says for each adds up to what all of them hold together."""
    settings = [f"layout.stages={stages}", "memory.loader=mmap"]
    job = spec.load(None, settings, model=str(models["packed"]), input="in", output="out")
    planned = sum(rank.weights_held for rank in plan.make(job, stages * shards).ranks)
    places = [Place(rank, stages, shards) for rank in range(stages * shards)]
    # The other one has pages around as well, for the system maps some.
    _, once = mapped_by(models["packed"], places)
    assert planned <= once < 1.01 * planned


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _mapped(pid: int, folder: Path, kind: str) -> int:
    """Bytes of files of a folder that a process has in memory, by one of /proc/PID/smaps's ways of counting."""
    found, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = f" {folder}/" in line
        elif inside and line.startswith(f"{kind}:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.mpiexec
@pytest.mark.parametrize(("kind", "loader"), [("packed", "read"), ("packed", "mmap"), ("gguf", "auto")])
def test_within_a_cgroup_of_the_planned_size(
    openmpi: Mpi, cgroup: Cgroup, models: dict[str, Path], tmp_path: Path, kind: str, loader: str
) -> None:
    lines = [
        {"custom_id": str(i), "prompt": [(i * 31 + j * 7) % 16_000 for j in range(64)], "max_tokens": 2}
        for i in range(8)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = [f"memory.loader={loader}", "memory.weights=30MiB", "memory.kv=48MiB", "layout.threads=1"]
    places = {
        "model": str(models[kind]),
        "input": str(tmp_path / "in.jsonl"),
        "output": str(tmp_path / "out"),
    }
    planned = plan.make(spec.load(None, settings, **places), 2)
    cgroup.limit(int(SPARE * sum(rank.held for rank in planned.ranks)))
    arguments = [f"--set={setting}" for setting in settings]
    arguments += [f"--{name}={value}" for name, value in places.items()]
    enter = f'echo $$ > {cgroup.path}/cgroup.procs && exec "$@"'
    command = openmpi.command(2, "-m", "mpillm", "run", *arguments)
    done = run_bounded(["sh", "-c", enter, "sh", *command], env=openmpi.environment())
    assert done.returncode == 0, done.stderr
    assert (cgroup.kills(), cgroup.swapped()) == (0, 0)
    made = msgspec.json.decode((tmp_path / "out" / report.JSON).read_bytes(), type=report.Report)
    for rank, before in zip(made.ranks, planned.ranks, strict=True):
        assert sum(rank.memory.values()) <= before.held
        assert rank.memory_peak <= sum(rank.memory.values())
        assert rank.weights["loaded"] > 2 * rank.weights["budget"]
