"""Runs in a memory cgroup of the planned size and a tenth: nothing is killed, nothing swaps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mpillm.job import plan, report, spec
from mpillm.job.bench import packed, synthetic
from tests.conftest import Mpi, run_bounded

SHAPE = synthetic.Shape("llama", 1024, 16, 16, 4, 64, 4096, 16_000)  # 140 MiB in Q4_0
SPARE = 1.1
CGROUPS = Path("/sys/fs/cgroup")


class Cgroup:
    """A memory cgroup below this process's own, of version 1 or 2."""

    def __init__(self) -> None:
        """OSError if there is none, or not for us."""
        own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        first = next((path for names, path in own.items() if "memory" in names.split(",")), None)
        self.first = first is not None
        parent = CGROUPS / "memory" / first[1:] if first else CGROUPS / own[""][1:]
        self.path = parent / f"mpillm-test-{os.getpid()}"
        self.path.mkdir()
        if not self.file("max").exists():
            self.path.rmdir()
            raise OSError("the memory controller is not delegated to this cgroup")

    def file(self, what: str) -> Path:
        names = {
            "max": "memory.limit_in_bytes",
            "peak": "memory.max_usage_in_bytes",
            "kills": "memory.oom_control",
        }
        later = {"max": "memory.max", "peak": "memory.peak", "kills": "memory.events"}
        return self.path / (names if self.first else later)[what]

    def limit(self, nbytes: int) -> None:
        self.file("max").write_text(str(nbytes))

    def kills(self) -> int:
        lines = (line.split() for line in self.file("kills").read_text().splitlines())
        return int(dict(lines)["oom_kill"])

    def swapped(self) -> int:
        if not self.first:
            return int((self.path / "memory.swap.current").read_text())
        lines = (line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(dict(lines).get("swap", 0))


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    try:
        made = Cgroup()
    except (OSError, KeyError) as error:
        pytest.skip(f"no memory cgroup can be made here (root can, mostly): {error}")
    yield made
    made.path.rmdir()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A model that is larger than Python, packed and as a GGUF file."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPILLM_CACHE", str(folder))
        patch.setitem(synthetic.SHAPES, "small", SHAPE)
        yield {"packed": packed.create("small", "q4_0", 1), "gguf": synthetic.create("small", "q4_0")}


@pytest.mark.mpi
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
