"""Hostfiles of both MPIs, with network namespaces as hosts: ranks land where the file says and talk over TCP."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts as tools
from tests.cluster.hosts import Hosts
from tests.cluster.jobs import reference, results, write_job
from tests.conftest import ROOT, Mpi, run_bounded

pytestmark = [pytest.mark.hosts, pytest.mark.mpiexec]

# Each rank sends its share of an all-reduce: nothing that shared memory may do for ranks on different hosts.
REDUCE = """
import socket, sys
import numpy as np
from mpi4py import MPI

world = MPI.COMM_WORLD
values = np.full(int(sys.argv[1]), world.rank + 1, np.float32)
world.Allreduce(MPI.IN_PLACE, values)
assert (values == world.size * (world.size + 1) / 2).all()
hosts = world.gather(socket.gethostname())
if world.rank == 0:
    print("hosts:", *hosts)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    reason = tools.missing()
    if reason:
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts"), 4).up() as up:
        yield up


@pytest.fixture
def hostfile(hosts: Hosts, mpi: Mpi, tmp_path: Path) -> Path:
    """The example of this MPI, with the addresses of the test's hosts in place of its names."""
    text = (ROOT / "slurm" / "hosts" / f"{mpi.name}.hosts").read_text()
    path = tmp_path / "hosts"
    path.write_text(re.sub(r"^node(\d)", lambda found: hosts.addresses[int(found[1]) - 1], text, flags=re.M))
    return path


def environment(mpi: Mpi) -> dict[str, str]:
    """What a login shell on the first host would have; MPICH would use shared memory between namespaces."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONPATH": str(ROOT), **mpi.env}
    return {**env, "UCX_TLS": "tcp,self"} if mpi.name == "mpich" else env


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_land_as_listed_and_talk_over_the_network(
    hosts: Hosts, mpi: Mpi, hostfile: Path, tmp_path: Path, ranks: int
) -> None:
    program = tmp_path / "reduce.py"
    program.write_text(REDUCE)
    count = 1 << 19  # 2 MiB of float32
    before = hosts.sent()
    # As the pages have it: the others find the virtual environment's python by PATH.
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [] if mpi.name == "mpich" else ["-x", "PATH"]
    command = [*hosts.launcher(mpi, hostfile), *words, "-n", str(ranks), "python", program, str(count)]
    done = run_bounded(hosts.on_first(command, environment(mpi) | path), 60)
    sent = [now - then for now, then in zip(hosts.sent(), before, strict=True)]
    assert done.returncode == 0, done.stderr
    assert f"hosts: {' '.join(f'{hosts.prefix}{number}' for number in range(1, ranks + 1))}\n" in done.stdout
    # Every rank's part must leave its host at least once; a host without a rank sends next to nothing.
    assert min(sent[:ranks]) > 4 * count * 0.9, sent
    assert max(sent[ranks:], default=0) < 100_000, sent


@pytest.mark.parametrize(
    ("mpi", "ranks", "layout", "replicas"),
    [
        ("openmpi", 2, "shards=2", 1),
        ("mpich", 4, "shards=4", 1),
        ("openmpi", 3, "stages=3", 1),
        ("mpich", 3, "replicas=3", 3),
    ],
    indirect=["mpi"],
)
def test_the_real_job_gives_the_same_bytes(
    hosts: Hosts, mpi: Mpi, hostfile: Path, tmp_path: Path, ranks: int, layout: str, replicas: int
) -> None:
    job = write_job(tmp_path)
    before = hosts.sent()
    program = [
        sys.executable,
        "-m",
        "mpillm",
        "run",
        job,
        "--output",
        tmp_path / "out",
        "--set",
        f"layout.{layout}",
    ]
    command = [*hosts.launcher(mpi, hostfile), "-n", str(ranks), *program]
    done = run_bounded(hosts.on_first(command, environment(mpi)), 90, cwd=tmp_path)
    sent = [now - then for now, then in zip(hosts.sent(), before, strict=True)]
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == reference(tmp_path, mpi, job)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["replicas"] == replicas
    # What ranks count as sent has left their hosts. Replicas send no activations.
    counted = [sum(kind["bytes_sent"] for kind in rank["messages"].values()) for rank in report["ranks"]]
    assert all(own >= count for own, count in zip(sent, counted, strict=False)), (sent, counted)
    assert replicas > 1 or min(counted) > 12 * 16 * 4, counted


def test_shards_on_two_hosts_measure_the_network_and_say_what_they_choose(
    hosts: Hosts, openmpi: Mpi, tmp_path: Path
) -> None:
    job, hostfile = write_job(tmp_path), tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses[:2]))
    settings = ["--set", "layout.shards=2", "--set", "wire.activations=auto", "--output", tmp_path / "out"]
    program = [sys.executable, "-m", "mpillm", "run", job, *settings]
    done = run_bounded(
        hosts.on_first([*hosts.launcher(openmpi, hostfile), "-n", "2", *program], environment(openmpi)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rounded = (
        "mpillm: Shards send Q8_0, so the last digits of answers depend on their number, 2 (over the network"
    )
    wire = json.loads((tmp_path / "out" / "report.json").read_text())["wire"]["activations"]
    assert wire == ("q8_0" if rounded in done.stderr else "f32")
    assert re.search(rf"Sent for each token: sums over shards \S+ \S+ \({wire}\)", done.stderr)
    assert wire == "q8_0" or results(tmp_path) == reference(tmp_path, openmpi, job)


def test_measuring_hosts_takes_no_memory_that_is_not_planned(
    hosts: Hosts, mpi: Mpi, hostfile: Path, tmp_path: Path
) -> None:
    """Speeds were measured with 48 MiB, which ranks of a tiny model do not take later."""
    job = write_job(tmp_path, 400, 60)
    program = [sys.executable, "-m", "mpillm", "run", job, "--set=layout.stages=3", "--set=layout.replicas=1"]
    command = [*hosts.launcher(mpi, hostfile), "-n", "3", *program]
    cache = tmp_path / "cache"
    done = run_bounded(hosts.on_first(command, environment(mpi) | {"MPILLM_CACHE": str(cache)}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((cache / "speeds").iterdir()), "nothing was measured"
    for rank in json.loads((tmp_path / "out" / "report.json").read_text())["ranks"]:
        assert rank["memory_peak"] <= sum(rank["memory"].values()), rank


@pytest.mark.parametrize(
    ("ranks", "plan", "layout"),
    [
        (2, "0:step:9:SIGKILL", "stages=2"),
        (2, "1:step:9:SIGKILL", "replicas=2"),
        # Two sums are under way, of two shards and in pieces of four.
        (2, "1:sum:48:SIGKILL", "shards=2"),
        (4, "3:sum:48:SIGKILL", "shards=4"),
        (3, "1:step:2:SIGKILL", "replicas=3"),  # it may get few lines
    ],
)
def test_a_rank_killed_on_another_host_is_survived(
    hosts: Hosts, openmpi: Mpi, tmp_path: Path, ranks: int, plan: str, layout: str
) -> None:
    """With ULFM, over TCP: whoever is left goes on."""
    victim, words = plan[0], f"--set=layout.{layout}"
    job, hostfile = write_job(tmp_path), tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses[:ranks]))
    program = [sys.executable, ROOT / "tests" / "e2e" / "dying.py", plan, "run", job, words]
    command = [*hosts.launcher(openmpi, hostfile), "--with-ft", "ulfm", "-n", str(ranks), *program]
    done = run_bounded(hosts.on_first(command, environment(openmpi)), 90, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        f"mpillm: Lost rank {victim} on {hosts.prefix}{int(victim) + 1}; the others continued" in done.stderr
    )
    assert results(tmp_path) == reference(tmp_path, openmpi, job)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_killed_while_two_sums_are_under_way(
    hosts: Hosts, mpich: Mpi, tmp_path: Path, ranks: int
) -> None:
    """MPICH ends the others, and the same command goes on, in lanes again."""
    job, hostfile = write_job(tmp_path), tmp_path / "hosts"
    hostfile.write_text(hosts.listed(mpich, ranks))
    start = [*hosts.launcher(mpich, hostfile), "-n", str(ranks), sys.executable]
    for sums in (48, 10**9):
        plan = f"{ranks - 1}:sum:{sums}:SIGKILL"
        program = [ROOT / "tests" / "e2e" / "dying.py", plan, "run", job, f"--set=layout.shards={ranks}"]
        done = run_bounded(hosts.on_first([*start, *program], environment(mpich)), cwd=tmp_path)
        assert (done.returncode == 0) == (sums > 48), done.stderr
    assert results(tmp_path) == reference(tmp_path, mpich, job)


def test_nothing_is_left(tmp_path: Path) -> None:
    """Hosts go with their block, even when it fails."""
    if tools.missing():
        pytest.skip(str(tools.missing()))
    inside = Hosts(tmp_path, 2)
    inside.prefix, inside.switch = f"{inside.prefix}x", f"{inside.switch}x"

    def fail() -> None:
        with inside.up():
            assert inside.prefix in run_bounded(["ip", "netns", "list"]).stdout
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert inside.prefix not in run_bounded(["ip", "netns", "list"]).stdout
