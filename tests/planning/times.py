"""Planned beside measured time and memory: `python -m tests.planning.times` runs eight jobs of different kinds.

`--others` runs jobs to which no constant of the plan was fitted: other models (random weights), kinds and settings.

`doctor` measures the machine's speeds first, on as many ranks as each job has. Nothing else should run beside it.
A line for each job has planned and measured, and what the plan was of it; the goals are 0.80 to 1.20 of the time,
and 1.00 to 1.25 of the memory of the rank that took most. Each job runs three times, in turns with the others, and the
median counts: one job's own time varies by up to 17 %. Nothing is guessed (`batch.speculation`): how often a text
repeats itself is not known before.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mpillm.bench import synthetic
from tests.conftest import MISSING, clean_environment, find_openmpi, run_bounded
from tests.e2e.jobs import WORDS

LIMIT = 900  # seconds of a command
RUNS = 3  # of each job
FETCHED = 2**30  # bytes of memory before each run


@dataclass(frozen=True)
class Job:
    """So many lines, with prompts of so many words, and what else each line and the job say.

    `synthetic` is the shape and the weights of a model with random weights; words are token ids then.
    """

    lines: int
    words: int
    more: dict[str, Any]
    settings: tuple[str, ...] = ()
    ranks: int = 1
    key: str = "prompt"
    synthetic: tuple[str, str] | None = None

    def body(self, draw: random.Random) -> dict[str, Any]:
        """What a line asks."""
        if self.synthetic:
            return {self.key: draw.choices(range(10, 30_000), k=self.words), **self.more}
        return {self.key: " ".join(draw.choices(WORDS, k=self.words)), **self.more}


def answers(tokens: int) -> dict[str, Any]:
    """Answers of exactly so many tokens."""
    return {"max_tokens": tokens, "ignore_eos": True}


JOBS = {
    "one answer": Job(1, 20, answers(200)),
    "32 answers": Job(32, 20, answers(100)),
    "300 answers": Job(300, 10, answers(40)),
    "long prompts": Job(8, 1500, answers(4)),
    "labels": Job(400, 60, answers(1)),
    "scores": Job(100, 100, {"max_tokens": 1, "echo": True, "logprobs": 1}),
    "paged weights": Job(32, 20, answers(40), ("memory.weights=40MiB",)),
    "two stages": Job(32, 20, answers(40), ("layout.stages=2", "layout.shards=1"), ranks=2),
}

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "logprobs": 5}
OTHERS = {
    "1b q4_k_m 16": Job(16, 30, answers(50), synthetic=("llama-1b:8", "q4_k_m")),
    "1b bf16 one": Job(1, 30, answers(60), synthetic=("llama-1b:4", "bf16")),
    "1b q8_0 long": Job(4, 1500, answers(8), synthetic=("llama-1b:8", "q8_0")),
    "8b q6_k paged": Job(16, 30, answers(20), ("memory.weights=500MiB",), synthetic=("llama-8b:2", "q6_k")),
    "qwen3 mixture": Job(8, 30, answers(30), synthetic=("qwen3-30b-a3b:3", "q4_0")),
    "mixture paged": Job(
        8, 30, answers(30), ("memory.weights=500MiB",), synthetic=("qwen3-30b-a3b:3", "q4_0")
    ),
    "gpt-oss one": Job(1, 100, answers(60), synthetic=("gpt-oss-20b:2", "mxfp4")),
    "gemma q4_0 32": Job(32, 20, answers(20), synthetic=("gemma-3-27b:2", "q4_0")),
    "embeddings": Job(300, 80, {}, key="input"),
    "sampled": Job(64, 20, {**answers(60), **SAMPLED}),
    "eight choices": Job(16, 200, {**answers(50), "n": 8, "temperature": 1.0}),
    "q8_0 kv": Job(8, 1200, answers(100), ("memory.kv_type=q8_0",)),
    "two shards": Job(64, 40, answers(60), ("layout.stages=1", "layout.shards=2"), ranks=2),
    "two replicas": Job(128, 40, answers(60), ("layout.replicas=2",), ranks=2),
}


def mpillm(*words: str | Path, ranks: int = 1) -> str:
    """What a command prints on so many ranks; AssertionError if it fails."""
    command, env = [sys.executable, "-m", "mpillm", *words], clean_environment()
    if ranks > 1:
        mpi = find_openmpi()
        assert mpi is not None, MISSING["openmpi"]
        command, env = [*mpi.command(ranks), *command[1:]], mpi.environment()
    done = run_bounded(command, LIMIT, env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fetch_memory() -> None:
    """Have free memory at hand: what a virtual machine has given back to its host comes again at half a GB/s."""
    np.ones(FETCHED, np.uint8)


Run = Callable[[], tuple[float, float, float]]


def prepared(job: Job, model: str | Path, hosts: Path, folder: Path) -> tuple[float, Run]:
    """Planned seconds of computing, and a function that runs the job.

    That returns the measured seconds, and planned and measured MiB of the rank that took most.
    """
    draw = random.Random(job.words)
    lines = [f"{json.dumps(job.body(draw))}\n" for _ in range(job.lines)]
    (folder / "in.jsonl").write_text("".join(lines))
    words = ["--model", model, "--input", folder / "in.jsonl", "--output", folder / "out"]
    words += [f"--set={setting}" for setting in (*job.settings, "batch.speculation=off")]
    planned = json.loads(mpillm("plan", *words, "--hosts", hosts, "--json"))["time"]["seconds"]

    def run() -> tuple[float, float, float]:
        shutil.rmtree(folder / "out", ignore_errors=True)
        fetch_memory()
        mpillm("run", *words, ranks=job.ranks)
        report = json.loads((folder / "out/report.json").read_text())
        peak, of_plan = max((rank["memory_peak"], sum(rank["memory"].values())) for rank in report["ranks"])
        return report["phases"]["compute"], of_plan / 2**20, peak / 2**20

    return planned, run


def main() -> None:
    """Run the jobs, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--others", action="store_true", help="other jobs instead")
    parser.add_argument("--only", choices=JOBS | OTHERS, help="this job alone")
    options = parser.parse_args()
    jobs_of = OTHERS if options.others or options.only in OTHERS else JOBS
    chosen = {name: job for name, job in jobs_of.items() if options.only in (None, name)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in {job.ranks for job in chosen.values()}:
            fetch_memory()
            mpillm("doctor", "--output", folder / f"hosts-{ranks}.toml", ranks=ranks)
        jobs = dict[str, tuple[float, Run]]()
        for number, (name, job) in enumerate(chosen.items()):
            (own := folder / str(number)).mkdir()
            model = synthetic.create(*job.synthetic) if job.synthetic else options.model
            jobs[name] = prepared(job, model, folder / f"hosts-{job.ranks}.toml", own)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in jobs}
        for _ in range(RUNS):
            for name, (_, run) in jobs.items():
                found[name].append(run())
    head = f"{'planned':>9} {'measured':>9} {'ratio':>6}    "
    print(f"{'seconds, MiB':14} {head}   {head}   all runs")
    for name, (planned, _) in jobs.items():
        seconds, of_plan, peak = zip(*found[name], strict=True)
        time = planned, median(seconds)
        memory = max(zip(of_plan, peak, strict=True), key=lambda pair: pair[1])
        cells = [
            f"{plan:9.2f} {took:9.2f} {plan / took:6.2f} {'ok ' if low <= plan / took <= high else 'OFF'}"
            for (plan, took), (low, high) in ((time, (0.80, 1.20)), (memory, (1.00, 1.25)))
        ]
        print(f"{name:14} {'   '.join(cells)}   {' '.join(f'{each:.2f}' for each in seconds)}")


if __name__ == "__main__":
    main()
