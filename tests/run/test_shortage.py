"""A run that may take more memory than its host has says so before it takes any: the system would kill it silently."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.conftest import clean_environment, run_bounded
from tests.job_helpers import CHAT
from tests.run.cgroups import Cgroup


def test_too_little_memory_is_said_before_the_system_kills(cgroup: Cgroup, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a", "max_tokens": 2}))
    words = [sys.executable, "-m", "mpillm", "run", "--model", CHAT, "--input", "in.jsonl"]
    enter = ["sh", "-c", f'echo $$ > {cgroup.path}/cgroup.procs && exec "$@"', "sh"]
    cgroup.limit(400 * 2**20)
    enough = run_bounded([*enter, *words, "--output", "one"], env=clean_environment(), cwd=tmp_path)
    assert (enough.returncode, "for this run" in enough.stderr) == (0, False), enough.stderr
    cgroup.limit(70 * 2**20)
    slurm = clean_environment(SLURM_JOB_ID="1")
    short = run_bounded([*enter, *words, "--output", "two"], env=slurm, cwd=tmp_path)
    said = re.search(r"has ([\d.]+) MiB for this run, which may take ([\d.]+) MiB", short.stderr)
    assert said, short.stderr
    assert float(said[1]) < float(said[2])
    asked = re.search(r"type sbatch --mem=(\d+)M \.\.\., or lower memory.kv", short.stderr)
    assert asked
    assert int(asked[1]) > float(said[2])
