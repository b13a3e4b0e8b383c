"""A host, or mpiexec's daemon on it, is lost under `mpillm launch`: the run ends in time, and goes on without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster import hosts as tools
from tests.cluster.hosts import NETWORK, Hosts
from tests.conftest import HANGS, Mpi, run_bounded
from tests.e2e.jobs import CHAT, command, mixed_lines, run, write_lines

pytestmark = [pytest.mark.hosts, pytest.mark.mpiexec]


@pytest.mark.parametrize(
    ("mpi", "what", "layout"),
    [
        ("openmpi", "cable", []),
        ("mpich", "cable", []),
        ("openmpi", "daemon", []),
        ("mpich", "daemon", []),
        # Who waits for whom then does not depend on the MPI.
        ("openmpi", "daemon", ["layout.stages=2"]),
        ("mpich", "daemon", ["layout.replicas=2"]),
    ],
    indirect=["mpi"],
)
def test_what_is_lost_costs_a_host(mpi: Mpi, tmp_path: Path, what: str, layout: list[str]) -> None:
    if reason := tools.missing():
        pytest.skip(reason)
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(120, seed=4, tokens=60))
    output, hostfile = tmp_path / "out", tmp_path / "hosts"
    hostfile.write_text("".join(f"{NETWORK}.{number}:1\n" for number in (1, 2)))
    with Hosts(tmp_path, 2).up() as hosts:
        # A namespace whose cable is cut is still reached without the network; a host would not be.
        unreachable = tmp_path / "unreachable"
        agent = hosts.agent.read_text().replace(
            "shift\nspace", f'shift\n[ -e "{unreachable}" ] && [ "$host" != {NETWORK}.1 ] && exit 255\nspace'
        )
        hosts.agent.write_text(agent)
        words = command(source, output, "batch.max_num_seqs=2", "layout.threads=1", *layout)
        where = ["--hostfile", hostfile, "--agent", hosts.agent, *options(mpi)]
        env = {
            **{name: os.environ[name] for name in ("HOME", "PATH")},
            **mpi.env,
            "UCX_TLS": "tcp,self",  # MPICH would use shared memory between namespaces
            "MPILLM_DEADLINE": "3",
            "PYTHONPATH": mpi.environment()["PYTHONPATH"],
        }
        line = hosts.on_first([sys.executable, *words[:2], "launch", *where, *words[2:]], env)
        supervisor = subprocess.Popen(
            [str(word) for word in line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            wait_for_results(output / "journal")
            unreachable.touch()
            if what == "cable":
                run_bounded(["ip", "-n", hosts.switch, "link", "set", "port2", "down"])
            else:
                daemon_on(f"{hosts.prefix}2").kill()
            said, _ = supervisor.communicate(timeout=HANGS)
        finally:
            supervisor.kill()
            supervisor.communicate()
    assert supervisor.returncode == 0, said
    if what == "cable":
        assert "Rank 1 on" in said
    else:  # MPICH does not say where
        how = (
            "mpiexec lost its daemon on a host"
            if mpi.name == "mpich"
            else f"mpiexec lost its daemon on {hosts.prefix}2"
        )
        assert f"The run ended before it was complete ({how}); the next start is in" in said
    assert not re.search(r"PRTE|\[mpiexec|\[proxy|^---", said, re.M), "only the ranks and we speak"
    assert re.search(rf"The host {NETWORK}\.2 does not answer \(.+\); continuing without it\.", said)
    assert run(mpi, 1, source, tmp_path / "undisturbed").returncode == 0
    assert (output / "results.jsonl").read_bytes() == (
        tmp_path / "undisturbed" / "results.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("lost", ["daemon", "rank"])
def test_a_server_on_two_hosts_ends_with_one(mpi: Mpi, tmp_path: Path, lost: str) -> None:
    """Open MPI's mpiexec ends with 0 after it has lost a daemon."""
    if reason := tools.missing():
        pytest.skip(reason)
    hostfile, log = tmp_path / "hosts", tmp_path / "log"
    hostfile.write_text("".join(f"{NETWORK}.{number}:1\n" for number in (1, 2)))
    with Hosts(tmp_path, 2).up() as hosts:
        words = ["serve", "--model", CHAT, "--port", "0", "--data", tmp_path / "data"]
        where = ["--hostfile", hostfile, "--agent", hosts.agent, *options(mpi)]
        env = {
            **{name: os.environ[name] for name in ("HOME", "PATH")},
            **mpi.env,
            "UCX_TLS": "tcp,self",  # MPICH would use shared memory between namespaces
            "PYTHONPATH": mpi.environment()["PYTHONPATH"],
        }
        line = hosts.on_first([sys.executable, "-m", "mpillm", "launch", *where, *words], env)
        with log.open("wb") as file:
            server = subprocess.Popen([str(word) for word in line], stdout=file, stderr=file)
        try:
            while "answers at http://" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)
            daemon = daemon_on(f"{hosts.prefix}2")
            (daemon if lost == "daemon" else daemon.children()[0]).kill()
            assert server.wait(HANGS) == 75
        finally:
            server.kill()
            server.wait()
    said = log.read_text()
    assert re.match(
        r"mpillm: The ranks ended \((a rank on|mpiexec lost its daemon on) .*\); run the same",
        said.splitlines()[-1],
    )
    assert not re.search(r"PRTE|\[mpiexec|\[proxy|^---|\*\*\*", said, re.M), "only the ranks and we speak"


def options(mpi: Mpi) -> list[str]:
    """Which network to take, in this MPI's words."""
    lan = f"{NETWORK}.0/24"
    words = ["-iface", "eth0"] if mpi.name == "mpich" else ["--prtemca", "prte_if_include", lan]
    words += [] if mpi.name == "mpich" else ["--mca", "btl_tcp_if_include", lan]
    return [f"--mpi-option={word}" for word in words]


def daemon_on(host: str) -> psutil.Process:
    """What mpiexec has started on a host: prted or hydra_pmi_proxy, which starts the rank."""
    numbers = run_bounded(["ip", "netns", "pids", host]).stdout.split()
    processes = [psutil.Process(int(number)) for number in numbers]
    [rank] = [process for process in processes if "mpillm" in process.cmdline()]
    parent = rank.parent()
    assert parent is not None
    assert parent.name() in ("prted", "hydra_pmi_proxy")
    return parent


def wait_for_results(journal: Path) -> None:
    while not (journal.exists() and journal.stat().st_size > 4000):
        time.sleep(0.05)
