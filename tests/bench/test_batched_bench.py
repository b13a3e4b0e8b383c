"""Another program's `llama-batched-bench` as a peer, played by a script that prints what ik_llama.cpp's printed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mpillm.bench.batched_bench import BatchedBench
from mpillm.errors import JobError
from tests.conftest import clean_environment, run_bounded

TABLE = """
main: n_kv_max = 2048, n_batch = 2048
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    64 |      8 |    4 |    288 |    9.000 |   176.06 |    9.000 |     4.97 |    1.974 |    36.47 |
|    64 |      8 |    4 |    288 |    0.866 |   295.47 |    0.640 |    47.82 |    1.536 |   187.55 |

llama_print_timings:        load time =     238.93 ms
"""


def program(folder: Path, code: str) -> Path:
    """A program that notes its arguments and cores, and runs `code`."""
    made = folder / "llama-batched-bench"
    said = "' '.join([*sys.argv[1:], str(os.sched_getaffinity(0))])"
    noted = f"import os, sys\nopen('llama.log', 'w')\nopen(sys.argv[0] + '.said', 'w').write({said})\n"
    made.write_text(f"#!{sys.executable}\n{noted}{code}\n")
    made.chmod(0o755)
    return made


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_second_time_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.chdir(tmp_path)
    core = min(os.sched_getaffinity(0))
    program(tmp_path, f"sys.{stream}.write('''{TABLE}''')")
    peer = BatchedBench("ik", Path("llama-batched-bench"), Path("m.gguf"), 3, [core])
    assert peer.run([[1] * 64] * 4, 9) == [0.866, *[0.08] * 8]
    said = (tmp_path / "llama-batched-bench.said").read_text()
    assert not (tmp_path / "llama.log").exists(), "what it leaves behind is not left with the user"
    assert said == f"-m {tmp_path}/m.gguf -npl 4,4 -t 3 -c 512 -b 512 -npp 64 -ntg 8 {{{core}}}"


def test_a_table_that_is_cut_is_measured_again(tmp_path: Path) -> None:
    """llama.cpp's program ended before its last row was written on a loaded machine, with exit code 0."""
    lines = TABLE.splitlines(keepends=True)
    cuts = ["".join(lines[:5]), "".join(lines[:5]) + lines[5][:40]]
    log = "turn = os.path.getsize(log) if os.path.exists(log := sys.argv[0] + '.turns') else 0"
    code = f"{log}\nopen(log, 'a').write('.')\nprint({[*cuts, TABLE]!r}[turn], end='')"
    peer = BatchedBench("ik", program(tmp_path, code), Path("m.gguf"), 1, [min(os.sched_getaffinity(0))])
    assert peer.run([[1] * 64] * 4, 9) == [0.866, *[0.08] * 8]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit('no such model')", "ik failed with exit code 1: no such model"),
        ("", r"ik ended 5 times before it had printed its 2 measurements; measure on a machine that does"),
    ],
)
def test_a_program_that_fails_is_named(tmp_path: Path, code: str, reason: str) -> None:
    with pytest.raises(JobError, match=reason):
        BatchedBench("ik", program(tmp_path, code), Path("m.gguf"), 1, [0]).run([[1]], 1)


def test_the_table_has_its_name_and_ratio(tmp_path: Path) -> None:
    binary = program(tmp_path, f"print('''{TABLE}''')")
    done = run_bounded(
        [sys.executable, "-m", "mpillm", "bench", "--synthetic", "tiny-llama", "--what", "prefill,batch",
         "--sequences", "4", "--threads", "1", "--repeats", "1", "--against", f"ik_llama.cpp={binary}"],
        env=clean_environment(MPILLM_CACHE=str(tmp_path)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"peer     ik_llama.cpp, {binary}" in done.stdout
    assert "ratio" in done.stdout
    assert f"{4 / (0.64 / 15):.1f}" in done.stdout
