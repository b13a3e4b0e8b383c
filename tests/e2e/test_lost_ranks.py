"""Ranks die inside a run: with Open MPI's ULFM the others go on, and end in the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from pathlib import Path

import psutil
import pytest

from mpillm.comm.cores import physical
from tests.conftest import Mpi, get_mpi, run_bounded
from tests.e2e.jobs import CHAT, command, mixed_lines, write_lines
from tests.model.golden import FIXTURES, model_path

pytestmark = pytest.mark.mpiexec
PROGRAM = Path(__file__).with_name("dying.py")
SETTINGS = ["batch.max_num_seqs=4"]
ADAPTER = FIXTURES / "adapters" / "chat_all"
ALL = "layout.replicas=1"  # all ranks compute, however many cores there are


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lost") / "in.jsonl", mixed_lines(24, seed=6, tokens=20))


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> Path:
    output = source.with_name("undisturbed")
    done = get_mpi("openmpi").run(1, *command(source, output, *SETTINGS, "batch.speculation=off"))
    assert done.returncode == 0, done.stderr
    return output


def dying(
    mpi: Mpi, ranks: int, plan: str, source: Path, output: Path, *settings: str, model: Path = CHAT
) -> str:
    """Run with ranks that die as planned; what was said. The run must end well, and leave nobody behind."""
    words = command(source, output, *SETTINGS, "batch.speculation=prompt-lookup", *settings, model=model)[2:]
    mpiexec, *words = mpi.command(ranks, PROGRAM, plan, *words)
    env = mpi.environment(MPILLM_DEADLINE="2" if "HANG" in plan else "8")
    done = run_bounded([mpiexec, "--with-ft", "ulfm", *words], env=env)
    assert done.returncode == 0, done.stderr
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert str(output) not in process.cmdline()
    return done.stderr


def assert_same(output: Path, undisturbed: Path) -> None:
    for name in ("results.jsonl", "results.h5"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize(
    ("ranks", "plan", "layout"),
    [
        pytest.param(2, "1:step:9:SIGKILL", "1 x 1", id="one of two shards"),
        pytest.param(4, "3:step:9:SIGKILL", "1 x 2", id="one of four"),
        pytest.param(4, "0:step:9:SIGKILL", "1 x 2", id="rank 0"),
        pytest.param(4, "1:step:9:SIGKILL,2:step:9:SIGKILL", "1 x 2", id="two at once"),
        pytest.param(4, "3:step:9:SIGKILL,1:shrink:1:SIGKILL", "1 x 2", id="one more in the shrink"),
        pytest.param(4, "0:step:9:SIGKILL,1:shrink:1:SIGKILL", "1 x 2", id="rank 0 and its heir"),
        pytest.param(
            4, "3:step:20:SIGKILL,1:open:2:SIGKILL", "1 x 2", id="one more while the job is opened again"
        ),
        pytest.param(2, "0:step:9:SIGSTOP", "1 x 1", id="rank 0 stopped"),
        pytest.param(2, "1:step:9:HANG", "1 x 1", id="one that hangs"),
        pytest.param(2, "0:write:1:SIGKILL", "1 x 1", id="rank 0 while it writes"),
    ],
)
def test_the_others_go_on(
    ranks: int, plan: str, layout: str, source: Path, undisturbed: Path, openmpi: Mpi, tmp_path: Path
) -> None:
    said = dying(openmpi, ranks, plan, source, tmp_path / "out", ALL)
    for victim in plan.split(","):
        assert re.search(rf"^mpillm: Lost .*\brank {victim[0]} on ", said, re.MULTILINE), said
    assert_same(tmp_path / "out", undisturbed)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert f"{report['stages']} x {report['shards']}" == layout
    assert any(warning.startswith("Lost rank ") for warning in report["warnings"])


@pytest.mark.parametrize(
    "plan",
    [
        "1:step:9:SIGKILL",  # one in reserve takes its place
        "0:step:9:SIGKILL,1:step:9:SIGKILL",  # those in reserve are all that is left
        "2:stand:2:SIGKILL,0:step:1:SLOW",
    ],
)
def test_ranks_without_a_core_are_kept_in_reserve(
    plan: str, source: Path, undisturbed: Path, openmpi: Mpi, tmp_path: Path
) -> None:
    cores = sorted(physical(os.sched_getaffinity(0), Path("/")))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # that of mpiexec and its ranks
    try:
        said = dying(openmpi, 4, plan, source, tmp_path / "out", f"adapters.tuned={ADAPTER}")
    finally:
        os.sched_setaffinity(0, before)
    # The spare rank may be lost before the others have begun.
    reserve = "(2 of 4 ranks are|1 of 3 ranks is) kept in reserve, because there are only 2 cores;"
    assert re.search(reserve, said), said
    assert (tmp_path / "out/results.jsonl").read_bytes() == (undisturbed / "results.jsonl").read_bytes()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert f"{report['stages']} x {report['shards']}" == "1 x 2"
    assert len(report["ranks"]) == 2


def test_ranks_keep_their_own_budgets(source: Path, undisturbed: Path, openmpi: Mpi, tmp_path: Path) -> None:
    """A list has a value for each rank as it was started, however many of those before it are lost."""
    budgets = [2**20, 2**22, 2**21]
    own = ["layout.replicas=3", f"memory.kv={budgets}"]
    dying(openmpi, 3, "1:step:9:SIGKILL", source, tmp_path / "out", *own)
    assert_same(tmp_path / "out", undisturbed)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [rank["kv"]["budget"] for rank in report["ranks"]] == [2**20, 2**21]


def test_states_are_computed_again(openmpi: Mpi, tmp_path: Path) -> None:
    """A model whose layers keep a state for each sequence, with prompts that begin alike."""
    model, draw = model_path("qwen3_next"), random.Random(12)
    ids = [draw.randrange(140) for _ in range(100)]
    lines = [
        {
            "custom_id": str(number),
            "prompt": ids[:70] + ids[-number - 1 :],
            "max_tokens": 9 + number % 5,
            "temperature": number % 2,
            "logprobs": number % 3,
        }
        for number in range(16)
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    whole = openmpi.run(1, *command(source, tmp_path / "whole", *SETTINGS, model=model))
    assert whole.returncode == 0, whole.stderr
    for layout in ("stages", "shards"):
        output = tmp_path / layout
        said = dying(openmpi, 2, "1:step:12:SIGKILL", source, output, f"layout.{layout}=2", model=model)
        assert re.search(r"^mpillm: Lost .*\brank 1 on ", said, re.MULTILINE), said
        assert_same(output, tmp_path / "whole")


def test_no_token_is_drawn_twice(source: Path, undisturbed: Path, openmpi: Mpi, tmp_path: Path) -> None:
    """A follower dies: what had been generated is kept, also without checkpoints."""
    dying(openmpi, 2, "1:step:20:SIGKILL", source, tmp_path / "out", "job.checkpoint_tokens=0")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", undisturbed)]
    assert reports[0]["tokens"]["generated"] == reports[1]["tokens"]["generated"]
    assert reports[0]["tokens"]["recomputed"] > 0


def test_with_the_q8_0_wire_as_many_shards_give_the_same_bytes(
    source: Path, undisturbed: Path, openmpi: Mpi, tmp_path: Path
) -> None:
    """Stages may come and go; of other shards it is said that they change what follows."""
    wire = "wire.activations=q8_0"
    said = dying(openmpi, 2, "1:step:9:SIGKILL", source, tmp_path / "stages", wire, "layout.stages=2")
    assert "may differ" not in said
    ours, theirs = (folder / "results.jsonl" for folder in (tmp_path / "stages", undisturbed))
    assert ours.read_bytes() == theirs.read_bytes()
    assert "may differ" in dying(openmpi, 2, "1:step:9:SIGKILL", source, tmp_path / "shards", wire)
