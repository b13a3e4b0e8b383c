"""A user's mistakes end in one sentence and exit code 2, whatever the number of ranks; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mpi, run_bounded
from tests.e2e.jobs import CHAT, assert_one_sentence, command, mixed_lines, results, run, write_lines
from tests.job_helpers import without_tokenizer

pytestmark = pytest.mark.mpiexec


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "requests.jsonl", mixed_lines(3))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sampling.temprature=1", ["unknown key 'sampling.temprature'", "sampling.temperature"]),
        ("layout.shards=3", ["cannot be laid out on 2 ranks", "what works: ", "1 stage x 2 shards"]),
        ("memory.weights=100", ["memory.weights is too small: this rank needs at least", "KiB for the two"]),
        ("memory.kv=64", ["memory.kv = 64 is too small: 32 tokens take "]),
        ("model=nothing-like-it", ["'nothing-like-it' is not a file"]),
    ],
)
def test_a_wrong_setting(setting: str, words: list[str], openmpi: Mpi, source: Path, tmp_path: Path) -> None:
    arguments = command(source, tmp_path / "out", setting)
    if setting.startswith("model="):
        arguments[arguments.index("--model") + 1] = setting.removeprefix("model=")
        del arguments[-2:]
    assert_one_sentence(openmpi.run(2, *arguments), 2, *words)


def test_a_wrong_command_is_said_once(mpi: Mpi) -> None:
    done = mpi.run(3, "-m", "mpillm", "jobs/quickstart.toml")
    assert done.returncode == 2
    assert done.stderr.count("did you mean run jobs/quickstart.toml?") == 1


def test_a_wrong_job_file(openmpi: Mpi, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text('input = "x"\nmodel = = 3\n')
    assert_one_sentence(openmpi.run(2, "-m", "mpillm", "run", str(job)), 2, "is not TOML", "line 2")
    missing = openmpi.run(1, "-m", "mpillm", "run", str(tmp_path / "none.toml"))
    assert_one_sentence(missing, 2, "does not exist")


def test_input_and_output_are_the_same(openmpi: Mpi, source: Path) -> None:
    before = source.read_bytes()
    assert_one_sentence(run(openmpi, 2, source, source), 2, "the same")
    assert source.read_bytes() == before


def test_an_output_directory_of_another_job(openmpi: Mpi, source: Path, tmp_path: Path) -> None:
    assert run(openmpi, 1, source, tmp_path / "out").returncode == 0
    kept = (tmp_path / "out/results.jsonl").read_bytes()
    done = run(openmpi, 1, source, tmp_path / "out", "sampling.seed=5")
    assert_one_sentence(done, 2, "belongs to another job", "sampling.seed was 0 and is 5")
    assert (tmp_path / "out/results.jsonl").read_bytes() == kept


def test_a_model_that_is_cut_short(openmpi: Mpi, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(CHAT, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run(openmpi, 2, source, tmp_path / "out", model=broken)
    assert_one_sentence(done, 2, str(weights))


def test_a_configuration_that_would_change_the_result(openmpi: Mpi, source: Path, tmp_path: Path) -> None:
    changed = tmp_path / "model"
    shutil.copytree(CHAT, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    done = run(openmpi, 2, source, tmp_path / "out", model=changed)
    assert_one_sentence(done, 2, "final_logit_softcapping")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer."""
    return without_tokenizer(tmp_path_factory.mktemp("bare"))


def test_no_tokenizer_and_prompts_of_token_ids(openmpi: Mpi, bare: Path, tmp_path: Path) -> None:
    lines = [{"prompt": [5, 6, 7], "max_tokens": 3}, {"prompt": "text"}]
    done = run(openmpi, 1, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out", model=bare)
    assert done.returncode == 1
    good, bad = results(tmp_path / "out")
    words = good["response"]["body"]["choices"][0]["text"].split()
    assert len(words) == 3
    assert all(word.startswith("token_id:") for word in words)
    assert "no tokenizer" in bad["error"]["message"]


def test_no_tokenizer_and_nothing_but_texts(openmpi: Mpi, bare: Path, tmp_path: Path) -> None:
    """No line can work, so none is computed, and the output is free for an input that can."""
    lines = [{"prompt": "text"}, {"messages": [{"role": "user", "content": "text"}]}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    done = run(openmpi, 2, source, tmp_path / "out", model=bare)
    said = f"can answer no request of {source}; line 1: prompt is a string and the model has no tokenizer"
    assert_one_sentence(done, 2, said, "give token ids, or put its tokenizer.json beside it")
    write_lines(source, [{"prompt": [5, 6, 7], "max_tokens": 3}])
    assert run(openmpi, 2, source, tmp_path / "out", model=bare).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 64 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or run_bounded(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount]).returncode
    ):
        pytest.skip("needs root to mount a tmpfs")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_full_disk_loses_nothing(openmpi: Mpi, small_disk: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(120, seed=9))
    done = run(openmpi, 2, source, small_disk / "out")
    assert_one_sentence(done, 75, "no space left", "run the same command again")
    run_bounded(["mount", "-o", "remount,size=64m", small_disk])
    again = run(openmpi, 2, source, small_disk / "out")
    assert again.returncode == 0, again.stderr
    assert "by earlier runs" in again.stderr
    assert run(openmpi, 1, source, tmp_path / "whole").returncode == 0
    for name in ("results.jsonl", "results.h5"):
        assert (small_disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_disk_that_cannot_be_written(openmpi: Mpi, source: Path, small_disk: Path) -> None:
    run_bounded(["mount", "-o", "remount,ro", small_disk])
    assert_one_sentence(run(openmpi, 2, source, small_disk / "out"), 2, "cannot be written", "Read-only")
