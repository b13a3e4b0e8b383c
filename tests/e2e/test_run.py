"""The whole program: a file of requests becomes a directory of answers, the same bytes however it is run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import h5py
import pytest

from mpillm.planning import hosts
from mpillm.planning.hosts import Host
from mpillm.store.report import read
from tests.conftest import Mpi, run_bounded
from tests.e2e.jobs import CHAT, assert_one_sentence, command, mixed_lines, results, run, write_lines
from tests.model.golden import model_path

pytestmark = pytest.mark.mpiexec


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("input") / "requests.jsonl", mixed_lines(24, seed=3))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process without mpiexec."""
    output = tmp_path_factory.mktemp("alone") / "out"
    done = run_bounded([os.sys.executable, *command(source, output)])
    assert done.returncode == 0, done.stderr
    return output


def assert_same_results(one: Path, other: Path) -> None:
    for name in ("results.jsonl", "results.h5"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_every_request_once_in_order(undisturbed: Path) -> None:
    lines = results(undisturbed)
    assert [line["custom_id"] for line in lines] == [f"r{i}" for i in range(24)]
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in lines)
    bodies = [line["response"]["body"] for line in lines]
    assert bodies[0]["object"] == "chat.completion"
    assert bodies[0]["choices"][0]["message"]["role"] == "assistant"
    assert bodies[2]["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert (
        len(bodies[3]["data"][0]["embedding"])
        == json.loads((CHAT / "config.json").read_text())["hidden_size"]
    )
    with h5py.File(undisturbed / "results.h5") as h5:
        assert h5["requests/custom_id"].asstr()[:].tolist() == [f"r{i}" for i in range(24)]
        assert "mpillm_version" in h5.attrs
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["requests"] == {"total": 24, "ok": 24, "errors": 0, "resumed": 0}


@pytest.mark.parametrize("ranks", [2, 4])
def test_same_bytes_under_each_mpi(
    mpi: Mpi, ranks: int, source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = run(mpi, ranks, source, tmp_path / "out", "layout.replicas=1")  # all compute, on two cores too
    assert done.returncode == 0, done.stderr
    assert "24 answered" in done.stderr
    assert_same_results(undisturbed, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["ranks"]) == ranks
    assert report["ranks"][0]["messages"]["step"]["bytes_sent"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        ["batch.max_num_seqs=1"],
        ["batch.max_num_seqs=3", "batch.max_num_batched_tokens=5"],
        ["layout.threads=3", "memory.kv=64KiB"],
        ["layout.stages=2", "layout.shards=1"],
    ],
    ids=",".join,
)
def test_same_bytes_whatever_the_batch_the_threads_and_the_layout(
    settings: list[str], openmpi: Mpi, source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = run(openmpi, 2, source, tmp_path / "out", *settings)
    assert done.returncode == 0, done.stderr
    assert (undisturbed / "results.jsonl").read_bytes() == (tmp_path / "out/results.jsonl").read_bytes()


@pytest.mark.parametrize("policy", ["cycle", "lru"])
def test_same_bytes_with_two_layers_in_memory(
    policy: str, openmpi: Mpi, source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    held = json.loads((undisturbed / "report.json").read_text())["ranks"][0]["weights"]
    budget = f"memory.weights={int(held['share'] * 0.75)}"
    done = run(openmpi, 1, source, tmp_path / "out", budget, f"memory.policy={policy}")
    assert done.returncode == 0, done.stderr
    assert_same_results(undisturbed, tmp_path / "out")
    weights = json.loads((tmp_path / "out/report.json").read_text())["ranks"][0]["weights"]
    assert weights["peak"] <= weights["budget"] < weights["share"]
    assert weights["misses"] > held["misses"]
    assert weights["loaded"] > held["loaded"]


@pytest.mark.parametrize("path", ["scalar", "avx2"])
def test_same_bytes_on_other_instruction_sets(
    path: str, openmpi: Mpi, source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = run(openmpi, 1, source, tmp_path / "out", MPILLM_KERNELS=path)
    if "cannot be used on this machine" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert_same_results(undisturbed, tmp_path / "out")


def test_without_a_compiler_numpy_serves(
    source: Path, undisturbed: Path, tmp_path: Path, openmpi: Mpi
) -> None:
    done = run(openmpi, 2, source, tmp_path / "out", MPILLM_KERNELS="numpy")
    assert done.returncode == 0, done.stderr
    ours, theirs = results(tmp_path / "out"), results(undisturbed)
    for one, other in zip(ours, theirs, strict=True):
        assert one["custom_id"] == other["custom_id"]
    scored = [
        line["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"][1:]
        for line in (ours[2], theirs[2])
    ]
    assert scored[0] == pytest.approx(scored[1], abs=1e-3)


def test_numpy_on_some_ranks_is_said(source: Path, tmp_path: Path, openmpi: Mpi) -> None:
    """Their last digits differ, so another run may not repeat the answers."""
    words = command(source, tmp_path / "out")
    other = [":", "-n", "1", "-x", "MPILLM_KERNELS=numpy", sys.executable, *words]
    done = run_bounded([*openmpi.command(1, *words), *other], env=openmpi.environment())
    assert done.returncode == 0, done.stderr
    said = "NumPy computes on rank 1 on "
    assert done.stderr.count(said) == 1
    assert any(warning.startswith(said) for warning in read(tmp_path / "out").warnings)


def test_bad_lines_cost_no_other_line(openmpi: Mpi, tmp_path: Path) -> None:
    lines = mixed_lines(4)
    source = write_lines(tmp_path / "in.jsonl", lines)
    with source.open("a") as file:
        file.write("this is not JSON\n")
        file.write(json.dumps({**lines[0], "custom_id": "url", "url": "/v1/nothing"}) + "\n")
        file.write(json.dumps(lines[1]) + "\n")
        file.write(json.dumps({"custom_id": "long", "prompt": [5] * 5000}) + "\n")
        file.write(json.dumps({"custom_id": "id", "prompt": [1, 10**6]}) + "\n")
    done = run(openmpi, 2, source, tmp_path / "out")
    assert done.returncode == 1
    assert "4 answered, 5 with an error" in done.stderr
    found = results(tmp_path / "out")
    assert [line["response"]["status_code"] for line in found] == [200] * 4 + [400] * 5
    messages = [line["error"]["message"] for line in found[4:]]
    for message, words in zip(
        messages, ["JSON", "/v1/nothing", "already that of line 2", "5000 tokens", "1000000"], strict=True
    ):
        assert words in message
        assert message.startswith("Line ")


def test_a_request_that_cannot_fit_is_refused_with_its_arithmetic_and_others_wait(
    openmpi: Mpi, tmp_path: Path
) -> None:
    lines = [{"custom_id": "big", "prompt": [7] * 200, "max_tokens": 8}]
    lines += [{"custom_id": f"small{i}", "prompt": [7, i + 1], "max_tokens": 8} for i in range(6)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    done = run(openmpi, 1, source, tmp_path / "out", "memory.kv=16KiB")
    assert done.returncode == 1, done.stderr
    found = results(tmp_path / "out")
    assert [line["response"]["status_code"] for line in found] == [400] + [200] * 6
    assert "memory.kv = 16KiB holds" in found[0]["error"]["message"]


def test_ranks_that_see_different_models_refuse_to_start(openmpi: Mpi, tmp_path: Path) -> None:
    if os.geteuid() != 0 or run_bounded(["unshare", "-m", "true"]).returncode:
        pytest.skip("needs root and mount namespaces")
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(2))
    words = [os.sys.executable, *command(source, tmp_path / "out")]
    other = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount --bind {model_path("llama3")} {CHAT} && exec "$@"',
        "sh",
        *words,
    ]
    done = run_bounded(
        [openmpi.mpiexec, "-n", "1", *words, ":", "-n", "1", *other], env=openmpi.environment()
    )
    assert_one_sentence(done, 2, "Rank 1 on", "sees another model", "put the same files on every node")


def test_no_argument_is_the_quickstart(openmpi: Mpi, tmp_path: Path) -> None:
    from tests.model.test_smollm2 import smollm2

    smollm2()
    done = openmpi.run(2, "-m", "mpillm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "capital: " in done.stdout
    assert "Paris" in done.stdout or "France" in done.stdout
    assert (tmp_path / "out/quickstart/results.jsonl").exists()


def test_one_request_leaves_each_of_two_stages_idle_half_of_the_time(openmpi: Mpi, tmp_path: Path) -> None:
    """One computes while the other waits, so the bubbles that are measured are at least a half."""
    source = write_lines(
        tmp_path / "one.jsonl", [{"prompt": [5, 6, 7], "max_tokens": 12, "ignore_eos": True}]
    )
    done = run(openmpi, 2, source, tmp_path / "out", "layout.stages=2", model=model_path("llama3"))
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out").bubbles()
    assert found is not None
    assert 0.5 <= found < 1
    assert f"Stages were idle {100 * found:.0f} % of the computing time" in done.stderr


def test_same_bytes_with_more_layers_on_a_faster_host(openmpi: Mpi, tmp_path: Path) -> None:
    """The file of hosts says that the second rank is four times as fast; the report has the time that was planned."""
    lines = [{"prompt": list(range(5, 5 + 3 * n)), "max_tokens": 5, "logprobs": 2} for n in range(1, 9)]
    source, model = write_lines(tmp_path / "requests.jsonl", lines), model_path("llama3")
    slow, fast = (
        Host(memory="8GiB", name=name, products={"f32": [rate, rate, rate]})
        for name, rate in (("slow", 0.01), ("fast", 0.04))
    )
    hosts.write(tmp_path / "hosts.toml", [slow, fast])
    layout = ["layout.stages=2", f"layout.hosts={tmp_path / 'hosts.toml'}"]
    own = ["layout.threads=[1, 2]", 'memory.weights={default="all"}', 'memory.kv=["8MiB", "16MiB"]']
    uneven = run(openmpi, 2, source, tmp_path / "uneven", *layout, *own, model=model)
    assert uneven.returncode == 0, uneven.stderr
    alone = run_bounded([os.sys.executable, *command(source, tmp_path / "alone", model=model)])
    assert alone.returncode == 0, alone.stderr
    assert_same_results(tmp_path / "alone", tmp_path / "uneven")
    made = read(tmp_path / "uneven")
    assert [rank.layers for rank in made.ranks] == [1, 3]
    assert [(rank.threads, rank.kv["budget"]) for rank in made.ranks] == [(1, 8 * 2**20), (2, 16 * 2**20)]
    assert made.planned is not None
    assert 0 < made.planned.of_computed <= made.planned.seconds
    assert "were planned for these tokens. Expected limit of a step" in uneven.stderr
    assert read(tmp_path / "alone").planned is None
