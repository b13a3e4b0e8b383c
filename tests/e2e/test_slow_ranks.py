"""A rank that becomes slow while a run computes gets fewer layers, and no answer changes."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

from mpillm.planning import hosts
from mpillm.planning.hosts import Host
from tests.conftest import get_mpi, run_bounded
from tests.e2e.jobs import command, write_lines
from tests.model.golden import model_path

pytestmark = pytest.mark.mpiexec
PROGRAM = Path(__file__).with_name("slowing.py")
MODEL = model_path("llama3")  # of four layers


def lines(seed: int, count: int, tokens: int) -> list[dict[str, object]]:
    draw = random.Random(seed)
    return [
        {
            "prompt": [draw.randrange(139) for _ in range(draw.randint(1, 30))],
            "max_tokens": draw.randint(tokens // 2, tokens),
            "ignore_eos": True,
            "temperature": number % 2,
            "seed": number,
            "logprobs": number % 3,
            "n": 1 + number % 2,
        }
        for number in range(count)
    ]


@pytest.mark.parametrize(("library", "victim"), [("openmpi", "1"), ("mpich", "0")])
def test_it_gets_fewer_layers(library: str, victim: str, tmp_path: Path) -> None:
    mpi = get_mpi(library)
    source = write_lines(tmp_path / "in.jsonl", lines(int(victim), 6, 50))
    # By these speeds products take nearly all of a step; they are equal, so that the run begins with 2-2 layers.
    hosts.write(tmp_path / "hosts.toml", [Host(memory="8GiB", products={"f32": [0.01] * 3}, count=2)])
    settings = [
        "batch.max_num_seqs=2",
        "layout.threads=1",
        "layout.stages=2",
        f"layout.hosts={tmp_path / 'hosts.toml'}",
    ]
    words = command(source, tmp_path / "out", *settings, model=MODEL)[2:]
    done = mpi.run(2, PROGRAM, victim, *words)
    assert done.returncode == 0, done.stderr
    said = re.search(
        rf"Rank {victim} on \S+ computed for \d+% of the last \d+ s, the others for \d+%; "
        r"after \S+ s the run continues as 2 stages x 1 shard, layers (\d-\d)\.",
        done.stderr,
    )
    assert said, done.stderr
    assert said[1] == ("3-1" if victim == "1" else "1-3")
    assert f", slowest: rank {victim} (busy " in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(said[0] in warning for warning in report["warnings"])
    alone = run_bounded([sys.executable, *command(source, tmp_path / "alone", model=MODEL)])
    assert alone.returncode == 0, alone.stderr
    for name in ("results.jsonl", "results.h5"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
