"""Hosts on a slow network, measured: `python -m tests.cluster.table --dllama PATH` (root; minutes, on a quiet machine).

Hosts are network namespaces with a thread each, cables of 1 Gbit/s and of 100 Mbit/s. Beside layouts of 2 and 4 hosts
Distributed-Llama runs on the same file, if its program is there. Bytes are those of the hosts' interfaces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from tests.cluster import peer
from tests.cluster.compare import JobRun, compare, in_words
from tests.cluster.hosts import Hosts, missing
from tests.cluster.ranks import Measured
from tests.conftest import FINDERS, MISSING, ROOT, Mpi, run_bounded
from tests.planning.times import fetch_memory

PROMPT, TOKENS = 64, 24
LIMIT = 240  # seconds of a run
QUOTA = 0.33  # of a core, for the slow host
PERIOD = 100_000  # microseconds of such quotas
SHARES = 262_144  # the weight of such a host against all else that runs here; 1024 is usual
# What a program does in a namespace, which has another /sys, to see its control group.
GROUPS = "/sys/fs/cgroup"
SEEN = f"mount -t tmpfs none {GROUPS} && mkdir {GROUPS}/cpu && mount -t cgroup -o cpu none {GROUPS}/cpu"
# Answers of the jobs with a slow host. Until it has loaded its weights after s seconds, a job of T seconds has the fast
# one alone: of the sum of speeds (T + QUOTA * (T - s)) / (T * (1 + QUOTA)) are left, or 1 - 0.25 * s / T. A model of
# 10^9 weights takes such a host 6 s: a job of 10 s loses 0.15 by it, and one of 45 s 0.03. So the short job must only
# be no slower than on one host.
SLOW_LINES = (64, 320)


class Cluster:
    """Hosts that are up, and how ranks are started on them."""

    def __init__(self, hosts: Hosts, mpi: Mpi, folder: Path) -> None:
        self.hosts, self.folder, self._mpi = hosts, folder, mpi
        self._file = folder / "hosts"

    def start(self, ranks: int, *words: str | Path) -> str:
        """What a command prints on so many hosts, one rank on each."""
        self._file.write_text(self.hosts.listed(self._mpi, ranks))
        env = {name: os.environ[name] for name in ("PATH", "HOME")} | self._mpi.env
        # Speeds are kept for these hosts alone: others of the same names may be faster.
        env |= {
            "PYTHONPATH": str(ROOT),
            "OMP_WAIT_POLICY": "passive",
            "MPILLM_CACHE": str(self.folder / "cache"),
        }
        if self._mpi.name == "mpich":
            env["UCX_TLS"] = "tcp,self"  # it would use shared memory between namespaces
            own: list[str | Path] = []
        else:
            own = ["-x", "OMP_WAIT_POLICY", "--bind-to", "none"]
        launch = [*self.hosts.launcher(self._mpi, self._file), *own]
        command = [*launch, "-n", str(ranks), sys.executable, "-m", *words]
        done = run_bounded(self.hosts.on_first(command, env), LIMIT, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def timed(self, model: Path, ranks: int, **settings: object) -> Measured:
        """The engine on so many hosts (see `ranks.py`)."""
        fetch_memory()
        words = [model, json.dumps(settings), str(time.time()), str(PROMPT), str(TOKENS)]
        return Measured(**json.loads(self.start(ranks, "tests.cluster.ranks", *words).splitlines()[-1]))

    def job(self, model: Path, ranks: int, lines: int, *settings: str) -> JobRun:
        """A job of so many answers of 32 tokens, or one of 256."""
        body = {"max_tokens": 32 if lines > 1 else 256, "ignore_eos": True}
        fetch_memory()
        with model.open("rb") as file:
            while file.read(1 << 24):  # each layout finds the file in memory
                pass
        source, output = self.folder / "in.jsonl", self.folder / f"out{time.monotonic_ns()}"
        source.write_text("".join(json.dumps(body | {"prompt": [n + 1] * 16}) + "\n" for n in range(lines)))
        words = ["--model", model, "--input", source, "--output", output]
        # How many tokens are guessed is not known before: random models repeat themselves.
        own = "layout.threads=1", "memory.max_context=512", "batch.speculation=off"
        words += [f"--set={one}" for one in (*own, *settings)]
        self.start(ranks, "mpillm", "run", *words)
        report = json.loads((output / "report.json").read_text())
        layout = f"{report['replicas']} x {report['stages']} x {report['shards']}"
        return JobRun(report["seconds"], layout, (report.get("planned") or {"seconds": 0.0})["seconds"])


@contextlib.contextmanager
def limited(hosts: Hosts, quotas: Mapping[int, float]) -> Iterator[None]:
    """Hosts whose processes get parts of a core (control groups of version 1), by their numbers.

    They see their quota, as in a container, and what else runs on this machine takes none of it.
    """
    own = next(
        line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":cpu:" in line
    )
    agent, begin = hosts.agent.read_text(), hosts.begin
    hosts.agent.write_text(agent.replace("hostname $space; ", f"hostname $space; {SEEN}; "))
    with contextlib.ExitStack() as stack:
        for number, quota in quotas.items():
            group = Path(f"{GROUPS}/cpu{own}") / f"{hosts.prefix}{number}"
            group.mkdir()
            stack.callback(_remove, group)
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(int(quota * PERIOD)))
            (group / "cpu.shares").write_text(str(SHARES))
            # A program in a namespace has another /sys, and would quietly stay as fast as it was.
            enter = f"echo $$ > /proc/{os.getpid()}/root{group}/cgroup.procs || exit 1"
            only = f"if [ $space = {hosts.prefix}{number} ]; then {enter}; fi\nexec ip"
            hosts.agent.write_text(hosts.agent.read_text().replace("exec ip", only))
            hosts.begin += f"{enter}; {SEEN}; " if number == 1 else ""
        try:
            yield
        finally:
            hosts.agent.write_text(agent)
            hosts.begin = begin


def _remove(group: Path) -> None:
    """Remove a control group, whose last processes may be about to end."""
    until = time.monotonic() + 5
    while (group / "cgroup.procs").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    group.rmdir()


def slowed(hosts: Hosts, number: int) -> AbstractContextManager[None]:
    """A host that has QUOTA of a core."""
    return limited(hosts, {number: QUOTA})


def show(name: str, made: Measured) -> None:
    sent, memory = (", ".join(f"{value:.0f}" for value in of) for of in
                    ([one / 1e3 for one in made.sent], [one / 2**20 for one in made.memory]))  # fmt: skip
    print(
        f"{name:34} {made.layout:10} prefill {made.prefill:6.1f}  decode {made.decode:6.2f} tokens/s  first token "
        f"{made.first:5.2f} s  kB a token {sum(made.sent) / 1e3:6.1f} ({sent})  MiB {memory}",
        flush=True,
    )


def alone(cluster: Cluster, model: Path, program: Path | None, rate: str) -> None:
    """One sequence: ours by shards and as it chooses, and the peer, on 2 and 4 hosts."""
    for ranks in (2, 4):
        if program:
            few = Hosts(cluster.folder, ranks)
            few.prefix = cluster.hosts.prefix
            fetch_memory()
            show(f"{rate} {ranks} hosts, Distributed-Llama", peer.run(program, few, model, PROMPT, TOKENS))
        for wire in ("q8_0", "f32"):
            made = cluster.timed(model, ranks, shards=ranks, stages=1, replicas=1, activations=wire)
            show(f"{rate} {ranks} hosts, ours", made)
    show(f"{rate} 4 hosts, ours, stages", cluster.timed(model, 4, shards=1, stages=4, replicas=1))


def together(cluster: Cluster, model: Path, rate: str) -> None:
    """Jobs of 1 and 32 answers on every layout of two hosts, and as mpillm chooses; then with a slow host."""
    for lines in (1, 32):
        compare(cluster.job, cluster.folder, model, 2, lines, rate)
    for lines in SLOW_LINES:
        whole = cluster.job(model, 1, lines).seconds
        with slowed(cluster.hosts, 2):
            made = cluster.job(model, 2, lines)
        seconds, layout = made.seconds, in_words(made)
        print(
            f"{rate} {lines} answers, a host at {QUOTA}: {layout} {seconds:.2f} s, {whole / seconds:.2f} times as fast "
            f"as one host ({whole:.2f} s), {whole / seconds / (1 + QUOTA):.2f} of the sum of speeds",
            flush=True,
        )


def collectives(cluster: Cluster, rate: str) -> None:
    """All-gather and all-reduce by our messages and by MPI's own means, on 2 and 4 hosts."""
    for ranks in (2, 4):
        print(f"{rate}: {cluster.start(ranks, 'tests.comm.latency')}", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.table", description=__doc__)
    parser.add_argument("--dllama", type=Path, help="the program of Distributed-Llama")
    parser.add_argument("--rate", action="append", help="of the cables, in tc's words (1gbit and 100mbit)")
    parser.add_argument("--model", type=Path, help="where the model is kept (a folder that is deleted)")
    parser.add_argument("--only", choices=("alone", "together", "collectives"), help="a part of it")
    parser.add_argument("--mpi", choices=FINDERS, default="openmpi")
    options = parser.parse_args()
    mpi = FINDERS[options.mpi]()
    if (reason := missing()) or mpi is None:
        parser.error(reason or MISSING[options.mpi])
    with tempfile.TemporaryDirectory(prefix="table-") as name:
        folder = Path(name)
        model = options.model or folder / "llama-1b.m"
        if options.only != "collectives" and not model.exists():
            peer.write_model(model)
        for rate in options.rate or ["1gbit", "100mbit"]:
            with Hosts(folder, 4, rate).up() as hosts:
                cluster = Cluster(hosts, mpi, folder)
                if options.only in (None, "collectives"):
                    collectives(cluster, rate)
                if options.only in (None, "alone"):
                    alone(cluster, model, options.dllama, rate)
                if options.only in (None, "together"):
                    together(cluster, model, rate)


if __name__ == "__main__":
    main()
