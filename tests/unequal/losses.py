"""The whole program on unequal ranks, some of which are lost: `python -m tests.unequal.losses --runs 50 --seed S`.

Drawn are the ranks, their hosts (network namespaces, for root), the layout, budgets and threads as lists or tables by
host, what `differing` changes, and who dies where: one or several ranks, at points from the first meeting to the last
message, or at any moment. A job runs where the others go on (Open MPI's ULFM), under `launch`, or is typed again until
it is done: it ends with the results of one undisturbed rank. Some starts are servers (`clients`). All end with the
right exit code, and no process stays. Of a start that does not, the folder is kept, with stacks if it hung.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
from safetensors.numpy import load_file, save_file

from mpillm.words import count_of
from tests.chaos.jobs import ADAPTER, TUNED, lines
from tests.cluster import hosts as tools
from tests.cluster.hosts import Hosts
from tests.conftest import FINDERS, Mpi, run_bounded
from tests.e2e.jobs import CHAT, command, write_lines
from tests.unequal.clients import Served
from tests.unequal.drawing import LAYERS, deaths_of
from tests.unequal.rank import HANG
from tests.unequal.starts import Drawn, Fault

STARTS = 8  # of a command that is typed again
REQUESTS = 32
SERVERS = 0.2  # so many starts are servers
ADAPTERS = f"adapters.{TUNED}={ADAPTER}"
SCHEMA = {"type": "object", "properties": {"dog": {"type": "boolean"}}, "required": ["dog"]}


class Run(Drawn):
    """A job, and its starts."""

    def __init__(self, mpi: Mpi, folder: Path, seed: str, common: Path, up: Hosts | None) -> None:
        super().__init__(mpi, folder, seed, common, up)
        self.source, self.reference, self.output = common / "in.jsonl", common / "undisturbed", folder / "out"
        more = ["survives"] * 4 if mpi.name == "openmpi" else ["again"]
        self.way = self.draw.choice(["launch", "launch", "again", *more])
        self.launched = self.way == "launch"
        self.plan(deaths_of(self.draw, self.ranks))
        #: what is killed at any moment, if no rank dies at a point
        self.outside = "" if self.deaths else self.draw.choice(("rank", "rank", "mpiexec", "all"))

    def __str__(self) -> str:
        died = [f"{one.rank}:{one.point}:{one.count}:{one.signal}" for one in self.deaths]
        where = f"{len(self.names)} hosts, " if self.hosts else ""
        return f"{self.way}, {where}{self.ranks} ranks, {' '.join(died) or self.outside}"

    def go(self) -> Counter[str]:
        """Start until the job is done; raises Fault. Returns counts of what came."""
        counts, settings = Counter[str](), self.settings()
        for number in range(STARTS):
            before, self.log = self.died, self.folder / f"log-{number}"
            job = command(self.source, self.output, ADAPTERS, *settings, model=self.model)[2:]
            with self.started([*self.words(self.way == "survives"), *job]) as launcher:
                if self.outside and number < 2:
                    threading.Timer(self.draw.uniform(0.5, 8.0), self._strike, [launcher]).start()
                code, said = self.wait(launcher), self.said()
            counts[f"{self.way}: exit code {code}"] += 1
            if code == 0:
                break
            disturbed = self.died > before or (self.outside and number < 2)
            if code in (2, 70) or not (disturbed and self._may_end(said)):
                raise Fault(f"exit code {code}")
            settings = self.settings() if self.draw.random() < 0.5 else settings
        else:
            raise Fault(f"not done after {STARTS} starts")
        for name in ("results.jsonl", "results.h5"):
            if (self.output / name).read_bytes() != (self.reference / name).read_bytes():
                raise Fault(f"other {name}")
        return counts

    def _may_end(self, said: str) -> bool:
        """Whether a start in which ranks were lost may end before the job is done."""
        if self.way == "again" or self.outside in ("mpiexec", "all"):
            return True
        if self.way == "launch":
            return False
        hung = any(death.signal == HANG for death in self.deaths)  # two ranks may blame each other
        early = "before all ranks were connected", "mpillm: A rank was lost", "] A rank was lost"
        tight = "does not fit into the KV cache of the remaining ranks"
        return hung or any(words in said for words in (*early, tight))

    def _strike(self, launcher: subprocess.Popen[bytes]) -> None:
        """Kill a rank, all of them, or mpiexec (under `launch` the supervisor)."""
        if self.outside == "mpiexec":
            launcher.kill()
            return
        ranks = self.ranks_there()
        for one in ranks if self.outside == "all" else ranks[:1]:
            with contextlib.suppress(psutil.Error):
                one.kill()


def deeper(folder: Path) -> Path:
    """Make the chat model with LAYERS layers, which are its own again and again."""
    shutil.copytree(CHAT, folder)
    config = json.loads((folder / "config.json").read_text())
    own = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    (path,) = folder.glob("*.safetensors")
    tensors, layer = load_file(path), re.compile(r"\blayers\.(\d+)\.")
    for name in list(tensors):
        if found := layer.search(name):
            for number in range(int(found[1]) + own, LAYERS, own):
                tensors[layer.sub(f"layers.{number}.", name)] = tensors[name]
    save_file(tensors, path)
    return folder


def undisturbed(folder: Path) -> None:
    """Write the model and the requests, and the results of one rank."""
    made = lines(REQUESTS)
    for number in range(8, REQUESTS, 16):
        schema = {"type": "json_schema", "json_schema": {"name": "dog", "schema": SCHEMA}}
        chat = {"messages": [{"role": "user", "content": "the dog"}], "response_format": schema}
        made[number] = {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": chat,
        }
    source, model = write_lines(folder / "in.jsonl", made), deeper(folder / "model")
    alone = run_bounded([sys.executable, *command(source, folder / "undisturbed", ADAPTERS, model=model)])
    assert alone.returncode == 0, alone.stderr


def main() -> int:
    """Run, and say what came."""
    parser = argparse.ArgumentParser(prog="python -m tests.unequal.losses", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many (20)")
    parser.add_argument("--first", type=int, default=1, help="the number of the first (1)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (1)")
    parser.add_argument("--mpi", choices=sorted(FINDERS), default="openmpi", help="openmpi, or mpich")
    options = parser.parse_args()
    mpi, counts, faults = FINDERS[options.mpi](), Counter[str](), 0
    if mpi is None:
        parser.error(f"there is no {options.mpi} (see tests/conftest.py)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    with contextlib.ExitStack() as stack:
        folder, up = Path(tempfile.mkdtemp(prefix="losses-")), None
        undisturbed(folder)
        if reason := tools.missing():
            print(f"no hosts: {reason}", flush=True)
        else:
            up = stack.enter_context(Hosts(folder, 4).up())
        for number in range(options.first, options.first + options.runs):
            own, seed = folder / str(number), f"{options.seed} {number}"
            own.mkdir()
            begun, kind = (
                time.monotonic(),
                Served if random.Random(f"kind {seed}").random() < SERVERS else Run,
            )
            run = kind(mpi, own, seed, folder, up)
            print(f"{number}: {run}", end=" ", flush=True)
            try:
                counts += run.go() + Counter(runs=1, deaths=run.died)
                took = f"{time.monotonic() - begun:.0f} s, {run.after:.0f} s after the last"
                print(f"ok ({count_of(run.died, 'death')}, {took})", flush=True)
                shutil.rmtree(own)
            except Fault as fault:
                faults += 1
                print(f"WRONG: {fault}; see {own}", flush=True)
    print(
        f"{options.runs} runs, {faults} faults (seed {options.seed}, {mpi.name}): {dict(counts)}", flush=True
    )
    if not faults:
        shutil.rmtree(folder)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
