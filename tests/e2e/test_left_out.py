"""Hosts that would slow a run down: their ranks stand by, and the results are those of a run without them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from pathlib import Path
from subprocess import CompletedProcess
from urllib.request import Request, urlopen

import pytest

from mpillm.planning import hosts
from mpillm.planning.hosts import Host
from tests.conftest import HANGS, Mpi, run_bounded
from tests.e2e.jobs import assert_one_sentence, command, write_lines
from tests.model.golden import model_path
from tests.serve.serving import serving

pytestmark = [
    pytest.mark.mpiexec,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can give ranks other host names"),
]
DYING = Path(__file__).with_name("dying.py")
# Each rank has a host name of its own, and takes its neighbours for other machines.
NAMED = 'hostname "host${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"; exec "$0" "$@"'
CRAWLING = 1  # the rank on the slow host


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """The arguments of a run on a pipeline of three hosts, whose second one would need an hour."""
    draw = random.Random(5)
    lines = [
        {
            "prompt": [draw.randrange(139) for _ in range(draw.randint(1, 40))],
            "max_tokens": draw.randint(1, 16),
            "temperature": number % 2,
            "logprobs": number % 3,
        }
        for number in range(20)
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    rates = [1.0, 1e-6, 1.0]
    hosts.write(
        tmp_path / "hosts.toml", [Host(memory="8GiB", products={"f32": [rate] * 3}) for rate in rates]
    )
    layout = ["layout.replicas=1", "layout.shards=1", f"layout.hosts={tmp_path / 'hosts.toml'}"]
    return command(source, tmp_path / "out", "batch.max_num_seqs=4", *layout, model=model_path("llama3"))


def on_three_hosts(mpi: Mpi, words: list[str], *options: str, **env: str) -> CompletedProcess[str]:
    mpiexec, *command = named(mpi.command(3, *words))
    return run_bounded([mpiexec, *options, *command], env=mpi.environment(**env))


def named(command: list[str | Path]) -> list[str | Path]:
    """A command of mpiexec's whose ranks have host names of their own."""
    return [*command[:3], "unshare", "--uts", "sh", "-c", NAMED, *command[3:]]


def alone(folder: Path, job: list[str]) -> bytes:
    words = [str(folder / "alone") if word == str(folder / "out") else word for word in job]
    done = run_bounded([sys.executable, *words])
    assert done.returncode == 0, done.stderr
    return (folder / "alone" / "results.jsonl").read_bytes()


def test_ranks_of_a_slow_host_stand_by(mpi: Mpi, job: list[str], tmp_path: Path) -> None:
    # The model is at another path on the first host.
    elsewhere, model = tmp_path / "elsewhere", job.index("--model")
    elsewhere.symlink_to(job[model + 1])
    table = f'model={{host0="{job[model + 1]}", default="{elsewhere}"}}'
    done = on_three_hosts(mpi, [*job[:model], *job[model + 2 :], "--set", table])
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall(r"host1 is left out and kept in reserve: .* times as fast without it\.", done.stderr))
        == 1
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(rank["rank"], rank["host"]) for rank in report["ranks"]] == [(0, "host0"), (1, "host2")]
    assert report["stages"] == 2
    assert any("host1 is left out" in warning for warning in report["warnings"])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == alone(tmp_path, job)


def test_an_error_of_the_others_ends_all(openmpi: Mpi, job: list[str]) -> None:
    done = on_three_hosts(openmpi, [*job, "--set", "memory.kv=1KiB"])
    assert_one_sentence(done, 2, "memory.kv = 1KiB is too small")


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ("2:step:9:SIGKILL", ["host0"]),  # one can go on alone, and is faster so
        ("0:step:9:SIGKILL", ["host2"]),
        ("0:step:9:SIGKILL,2:step:9:SIGKILL", ["host1"]),  # the spare rank is all that is left
        (
            "1:stand:2:SIGKILL,0:step:1:SLOW",
            ["host0", "host2"],
        ),  # the spare rank itself, before all is computed
    ],
)
def test_a_spare_rank_outlives_others(
    openmpi: Mpi, job: list[str], tmp_path: Path, plan: str, left: list[str]
) -> None:
    words = [str(DYING), plan, *job[2:]]
    done = on_three_hosts(openmpi, words, "--with-ft", "ulfm", MPILLM_DEADLINE="8")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [rank["host"] for rank in report["ranks"]] == left
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == alone(tmp_path, job)


def test_a_server_goes_without_a_slow_host(mpi: Mpi, job: list[str], tmp_path: Path) -> None:
    settings = [f"--set=layout.hosts={tmp_path / 'hosts.toml'}", "--set=layout.shards=1"]
    start = named(mpi.command(3))
    with serving(tmp_path, start, mpi.environment(), *settings, model=model_path("llama3")) as (url, server):
        body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}).encode()
        with urlopen(Request(f"{url}/v1/completions", body), timeout=HANGS) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        server.send_signal(signal.SIGTERM)
        server.wait(HANGS)
    said = (tmp_path / "log").read_text()
    assert re.search(
        r"host1(, host2| and host2)? (is|are) left out and kept in reserve: .* times as fast without", said
    )
