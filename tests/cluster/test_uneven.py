"""Four hosts that hold the model, and three that hold a third of it each: these are the stages of one more replica."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mpillm.planning import hosts as files
from mpillm.planning.hosts import Host
from tests.cluster import hosts as tools
from tests.cluster.hosts import Hosts
from tests.cluster.jobs import reference, results, write_job
from tests.cluster.test_hosts import environment
from tests.conftest import ROOT, Mpi, run_bounded

pytestmark = [pytest.mark.hosts, pytest.mark.mpiexec]

FAST, SLOW = 4, 3
WEIGHTS = 100_000  # bytes of two layers of four
PLACES = [(replica, 0) for replica in range(FAST)] + [(FAST, stage) for stage in range(SLOW)]


@pytest.mark.parametrize(
    ("mpi", "killed"),
    [("mpich", None), ("openmpi", FAST), ("openmpi", FAST + 1)],  # MPICH ends a run with its first lost rank
    ids=["none", "its leader", "its second stage"],
    indirect=["mpi"],
)
def test_slow_hosts_are_one_pipeline_beside_fast_ones(mpi: Mpi, tmp_path: Path, killed: int | None) -> None:
    if reason := tools.missing():
        pytest.skip(reason)
    job, hostfile, speeds = write_job(tmp_path, 40), tmp_path / "hosts", tmp_path / "hosts.toml"
    files.write(
        speeds,
        [Host(memory="8GiB", name=name, count=count, products={"f32": [rate] * 3})
         for name, count, rate in (("fast", FAST, 0.04), ("slow", SLOW, 0.01))],
    )  # fmt: skip
    with Hosts(tmp_path, FAST + SLOW).up() as hosts:
        hostfile.write_text(hosts.listed(mpi, FAST + SLOW))
        weights = [f"{hosts.prefix}{number} = {WEIGHTS}" for number in hosts.numbers[FAST:]]
        settings = [f"layout.hosts={speeds}", f'memory.weights={{{", ".join(weights)}, default = "all"}}',
                    "layout.threads=1", "batch.max_num_seqs=2"]  # fmt: skip
        program: list[str | Path] = [ROOT / "tests" / "e2e" / "dying.py", f"{killed}:step:3:SIGKILL"]
        words = ["run", job, *(f"--set={setting}" for setting in settings)]
        start = hosts.launcher(mpi, hostfile)
        if killed is None:
            program = ["-m", "mpillm"]
        else:
            start += ["--with-ft", "ulfm"]
        command = [*start, "-n", str(FAST + SLOW), sys.executable, *program, *words]
        done = run_bounded(hosts.on_first(command, environment(mpi)), 120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == reference(tmp_path, mpi, job)
    if killed is not None:
        assert f"Lost rank {killed} on {hosts.prefix}{killed + 1}; the others continued" in done.stderr
    else:
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert [(rank["replica"], rank["stage"]) for rank in report["ranks"]] == PLACES
        # Each has computed: the slow ones' stages have passed rows on.
        assert all(rank["messages"]["pipe"]["bytes_sent"] > 0 for rank in report["ranks"][FAST:-1])
