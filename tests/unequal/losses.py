"""The whole program on unequal ranks, some of which are lost: `python -m tests.unequal.losses --runs 50 --seed S`.

Drawn are the ranks, their hosts (network namespaces, for root), the layout, budgets and threads as lists or tables by
host, what `differing` changes, and who dies where: one or several ranks, at points from the first meeting to the last
message, or at any moment. A job runs where the others go on (Open MPI's ULFM), under `launch`, or is typed again until
it is done. Each ends with the results of one undisturbed rank, with the right exit code and without processes that
stay. Of a start that hangs the stacks are kept in its folder, beside what it said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
from safetensors.numpy import load_file, save_file

from mpillm import spec
from mpillm.kernels import KV_BLOCK
from mpillm.planning import hosts as speeds
from mpillm.planning import plan
from mpillm.planning.hosts import Host
from tests.chaos.jobs import ADAPTER, TUNED, lines
from tests.chaos.starts import stretched
from tests.cluster import hosts as tools
from tests.cluster.hosts import Hosts
from tests.conftest import FINDERS, Mpi, run_bounded
from tests.e2e.jobs import CHAT, command, write_lines
from tests.unequal.rank import HANG, Death, Plan

PROGRAM = Path(__file__).with_name("rank.py")
LIMIT = 200.0  # seconds of a start
LINGER = 10.0  # seconds in which processes end behind mpiexec
STARTS = 8  # of a command that is typed again
SCHEMA = {"type": "object", "properties": {"dog": {"type": "boolean"}}, "required": ["dog"]}
SHAPES = {
    2: ((1, 2, 1), (1, 1, 2), (2, 1, 1)),
    3: ((3, 1, 1), (1, 3, 1)),
    4: ((2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (4, 1, 1)),
    6: ((3, 2, 1), (3, 1, 2), (2, 3, 1), (1, 3, 2), (1, 6, 1)),
    8: ((2, 2, 2), (2, 2, 2), (4, 1, 2), (2, 4, 1), (1, 4, 2)),
}
LAYERS = 6  # of the model
# Points at which ranks die (see `rank.py`), and up to how often they come there before.
POINTS = {
    "meet": 1, "begin": 1, "layout": 1, "measure": 1, "model": 1, "worker": 1, "made": 2, "step": 60, "step ": 60,
    "sum": 300, "give": 2, "get": 3, "part": 1, "check": 1, "count": 1, "wait": 1, "write": 1, "finish": 1, "stand": 3,
    "end": 1,
}  # fmt: skip
# The same for those that die after others.
LATER = {
    "begin": 2,
    "layout": 2,
    "model": 2,
    "worker": 2,
    "made": 4,
    "opened": 1,
    "again": 1,
    "regroup": 1,
    "shrink": 1,
}


class Fault(Exception):
    """A run that did not go as it must."""


class Run:
    """One job: what is drawn for it, and its starts."""

    def __init__(self, mpi: Mpi, folder: Path, seed: str, common: Path, up: Hosts | None) -> None:
        self.draw = draw = random.Random(seed)
        self.mpi, self.folder, self.seed = mpi, folder, seed
        self.model, self.source, self.reference = (
            common / name for name in ("model", "in.jsonl", "undisturbed")
        )
        ways = ["launch", "launch", "again"] + (["survives"] * 4 if mpi.name == "openmpi" else ["again"])
        self.way = draw.choice(ways)
        self.hosts = up if draw.random() < 0.35 else None
        self.ranks = draw.choice((2, 3, 4, 4, 6, 8))
        self.names = [socket.gethostname()]
        if self.hosts is not None:
            self.names = [f"{self.hosts.prefix}{number}" for number in self.hosts.numbers]
            self.names = self.names[: draw.choice((2, len(self.names)))]
            self.ranks = max(self.ranks // len(self.names), 1) * len(self.names)
        self.output = folder / "out"
        self.deaths = self._deaths()
        self.plan = Plan(
            seed,
            self.deaths,
            slow=draw.randrange(self.ranks) if draw.random() < 0.3 else None,
            moves=draw.random() < 0.3,
        )
        (folder / "plan.json").write_bytes(msgspec.json.encode(self.plan))
        for number in range(len(self.deaths)):
            (folder / f"death-{number}").touch()
        self.outside = draw.choice(("rank", "rank", "mpiexec", "all")) if not self.deaths else ""

    def _deaths(self) -> list[Death]:
        draw = self.draw
        count = draw.choice((0, 1, 1, 1, 2, 2, 3))
        victims = draw.sample(range(self.ranks), min(count, max(self.ranks - 1, 1)))
        made = list[Death]()
        for victim in victims:
            points = POINTS if not made or draw.random() < 0.5 else LATER
            point = draw.choice(sorted(points))
            number = "SIGKILL" if draw.random() < 0.9 else draw.choice(("SIGSTOP", HANG))
            if number == HANG and point in ("meet", "end", "stand", "wait"):
                number = "SIGKILL"
            made.append(Death(victim, point.strip(), draw.randint(1, points[point]), number))
        return made

    def settings(self) -> list[str]:
        """A layout, budgets, threads and sizes: nothing that changes a byte."""
        draw, found = self.draw, [f"adapters.{TUNED}={ADAPTER}"]
        shapes = SHAPES.get(self.ranks, ())
        if shapes and draw.random() < 0.75:
            replicas, stages, shards = draw.choice(shapes)
            found += [f"layout.replicas={replicas}", f"layout.stages={stages}", f"layout.shards={shards}"]
        elif draw.random() < 0.5:
            found.append("layout.replicas=1")
        one = plan.make(spec.load(None, [], model=str(self.model), input="in", output="out"), 1).ranks[0]
        block = KV_BLOCK * one.kv_token
        for key, values in (
            ("memory.kv", [24 * block, 40 * block, 400 * block]),
            (
                "memory.weights",
                ["all", "all", one.weights_minimum, (one.weights_minimum + one.weights_share) // 2],
            ),
            ("layout.threads", [1, 1, 2]),
        ):
            if draw.random() < 0.7:
                found.append(f"{key}={self._by_rank_or_host(values)}")
        if draw.random() < 0.2:
            made = [
                Host("8GiB", products={"f32": [draw.choice((0.01, 0.03))] * 3}) for _ in range(self.ranks)
            ]
            speeds.write(self.folder / "speeds.toml", made)
            found.append(f"layout.hosts={self.folder / 'speeds.toml'}")
        found.append(f"batch.max_num_seqs={draw.choice((1, 2, 4, 16))}")
        found.append(f"batch.max_num_batched_tokens={draw.choice((16, 33, 256))}")
        found.append(f"job.checkpoint_tokens={draw.choice((0, 1, 5, 64))}")
        found.append(f"batch.speculation={draw.choice(('off', 'auto', 'prompt-lookup'))}")
        return found

    def _by_rank_or_host(self, values: list[Any]) -> str:
        draw = self.draw
        if draw.random() < 0.5:
            return msgspec.json.encode([draw.choice(values) for _ in range(self.ranks)]).decode()
        named = draw.sample(self.names, draw.randint(0, len(self.names)))
        table = {name: draw.choice(values) for name in named} | {"default": draw.choice(values)}
        return (
            "{"
            + ", ".join(f"{name} = {msgspec.json.encode(one).decode()}" for name, one in table.items())
            + "}"
        )

    def go(self) -> Counter[str]:
        """Start until the job is done; raises Fault. Returns counts of what came."""
        counts, settings = Counter[str](), self.settings()
        for number in range(STARTS):
            counts["starts"] += 1
            code, said = self._start(settings, number)
            self._check_words(said)
            after = f"exit code {code} {self.way}"
            counts[after] += 1
            if code == 0:
                break
            if code in (2, 70):
                raise Fault(f"exit code {code}")
            if self.way == "launch" and self.outside != "mpiexec":
                raise Fault(f"launch ended with {code}")
            if self.way == "survives" and not self._may_end(said):
                raise Fault(f"did not go on: {code}")
            if number and not self._fired(number) and self.way != "survives":
                raise Fault(f"exit code {code} without a loss")
            settings = self.settings() if self.draw.random() < 0.5 else settings
        else:
            raise Fault(f"not done after {STARTS} starts")
        for name in ("results.jsonl", "results.h5"):
            if (self.output / name).read_bytes() != (self.reference / name).read_bytes():
                raise Fault(f"other {name}")
        return counts

    def after(self) -> float:
        """Seconds since the last death; 0 without one."""
        return time.time() - max(
            (one.stat().st_mtime for one in self.folder.glob("died-*")), default=time.time()
        )

    def _may_end(self, said: str) -> bool:
        """Whether a start that others should go on after may end all the same."""
        hung = any(death.signal == HANG for death in self.deaths)
        gone = len(list(self.folder.glob("death-*"))) <= len(self.deaths) - self.ranks
        early = "before all ranks were connected" in said
        return (
            gone or early or hung or bool(self.outside) or "does not fit into the KV cache of the rem" in said
        )

    def _fired(self, number: int) -> bool:
        left = len(list(self.folder.glob("death-*")))
        before, self._left = getattr(self, "_left", len(self.deaths)), left
        return left < before or bool(self.outside and number < 2)

    def _check_words(self, said: str) -> None:
        for word in ("Traceback", "has a bug", "WireError", "AssertionError"):
            if word in said:
                raise Fault(f"said {word}")

    def _start(self, settings: list[str], number: int) -> tuple[int, str]:
        words: list[str | Path] = [sys.executable, PROGRAM, self.folder, "mpillm"]
        job = command(self.source, self.output, *settings, model=self.model)[2:]
        log, hosts = self.folder / f"log-{number}", self.hosts
        hostfile = self.folder / "hosts"
        slots = self.ranks // len(self.names)
        form = "{}:{}" if self.mpi.name == "mpich" else "{} slots={}"
        if hosts is not None:
            hostfile.write_text(
                "".join(form.format(a, slots) + "\n" for a in hosts.addresses[: len(self.names)])
            )
        if self.way == "launch":
            words += ["launch"]
            if hosts is not None:
                words += ["--hostfile", hostfile, "--agent", hosts.agent]
                _, *options = hosts.launcher(self.mpi, hostfile)
                words += [f"--mpi-option={word}" for word in map(str, _after_agent(options))]
            else:
                words += ["-n", str(self.ranks)]
            words += job
        else:
            ulfm = ["--with-ft", "ulfm"] if self.way == "survives" else []
            first = [self.mpi.mpiexec] if hosts is None else hosts.launcher(self.mpi, hostfile)
            passed = ["-x", "MPILLM_DEADLINE"] if hosts is not None and self.mpi.name == "openmpi" else []
            words = [*first, *passed, *ulfm, "-n", str(self.ranks), *words, *job]
        env = self.mpi.environment(
            MPILLM_DEADLINE=f"{stretched(6.0):.1f}", MPILLM_CACHE=str(self.folder / "cache")
        )
        if hosts is not None:
            kept = ("HOME", "PATH", "PYTHONPATH", "MPILLM_DEADLINE", "MPILLM_CACHE", *self.mpi.env)
            few = {name: env[name] for name in kept} | (
                {"UCX_TLS": "tcp,self"} if self.mpi.name == "mpich" else {}
            )
            words = hosts.on_first(words, few)
        with log.open("wb") as file:
            file.write((" ".join(map(str, words)) + "\n").encode())
            file.flush()
            launcher = subprocess.Popen(
                [str(word) for word in words], env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._watch(launcher, number)
        finally:
            self._end(launcher)
        return launcher.returncode, log.read_text(errors="replace")

    def _watch(self, launcher: subprocess.Popen[bytes], number: int) -> None:
        begun = time.monotonic()
        strike = begun + self.draw.uniform(0.5, 8.0) if self.outside and number < 2 else float("inf")
        while launcher.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            if now > strike:
                strike = float("inf")
                self._strike(launcher)
            if now - begun > stretched(LIMIT):
                self._stacks()
                raise Fault(f"hangs: {list(self.folder.glob('stack-*'))}")
        until = time.monotonic() + stretched(LINGER)
        while (left := list(self._left_over())) and time.monotonic() < until:
            time.sleep(0.1)
        if left and all(death.signal == "SIGKILL" for death in self.deaths):
            told = [(one.pid, one.status(), one.cmdline()[:4]) for one in left]
            self._stacks()
            raise Fault(f"left behind: {told}")

    def _strike(self, launcher: subprocess.Popen[bytes]) -> None:
        ranks = [one for one in self._left_over() if "launch" not in one.cmdline() and _is_rank(one)]
        if self.outside == "mpiexec" and self.way != "launch":
            launcher.kill()
        for one in ranks if self.outside == "all" else self.draw.sample(ranks, min(1, len(ranks))):
            with contextlib.suppress(psutil.Error):
                one.kill()

    def _left_over(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def _stacks(self) -> None:
        for process in self._left_over():
            with contextlib.suppress(psutil.Error, OSError):
                stack = self.folder / f"stack-{process.pid}"
                process.send_signal(signal.SIGCONT)
                stack.write_text(run_bounded(["py-spy", "dump", "--pid", str(process.pid)], 30).stdout)

    def _end(self, launcher: subprocess.Popen[bytes]) -> None:
        for process in (launcher, *self._left_over()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        launcher.wait()


def _is_rank(process: psutil.Process) -> bool:
    return "python" in process.cmdline()[0]


def _after_agent(options: list[str | Path]) -> list[str | Path]:
    """The options of `Hosts.launcher` that `launch` does not give itself."""
    kept, skipped = list[str | Path](), {"-f": 1, "--hostfile": 1, "-launcher": 1, "-launcher-exec": 1}
    words = iter(map(str, options))
    for word in words:
        name = next(words) if word == "--prtemca" else ""
        if word in skipped or name == "plm_ssh_agent":
            next(words)
        else:
            kept += [word, name] if name else [word]
    return kept


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


def main() -> int:
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
        folder = Path(tempfile.mkdtemp(prefix="losses-"))
        made = lines(32)
        for number in (0, 16):
            schema = {"type": "json_schema", "json_schema": {"name": "dog", "schema": SCHEMA}}
            made[number + 8] = {
                "custom_id": f"r{number + 8}", "url": "/v1/chat/completions", "method": "POST",
                "body": {"messages": [{"role": "user", "content": "the dog"}], "response_format": schema},
            }  # fmt: skip
        source, model = write_lines(folder / "in.jsonl", made), deeper(folder / "model")
        words = command(source, folder / "undisturbed", f"adapters.{TUNED}={ADAPTER}", model=model)
        alone = run_bounded([sys.executable, *words])
        assert alone.returncode == 0, alone.stderr
        up = None
        if reason := tools.missing():
            print(f"no hosts: {reason}", flush=True)
        else:
            up = stack.enter_context(Hosts(folder, 4).up())
        for number in range(options.first, options.first + options.runs):
            own = folder / str(number)
            own.mkdir()
            run = Run(mpi, own, f"{options.seed} {number}", folder, up)
            where = f"{len(run.names)} hosts" if run.hosts else "1 host"
            died = ", ".join(f"{d.rank}:{d.point}:{d.count}:{d.signal}" for d in run.deaths) or run.outside
            print(f"{number}: {run.way}, {run.ranks} ranks on {where}, {died}", end=" ", flush=True)
            begun = time.monotonic()
            try:
                came = run.go()
                counts += came
                fired = len(run.deaths) - len(list(own.glob("death-*")))
                counts["deaths"] += fired
                print(
                    f"ok ({came['starts']} starts, {fired} deaths, {time.monotonic() - begun:.0f} s)",
                    flush=True,
                )
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
