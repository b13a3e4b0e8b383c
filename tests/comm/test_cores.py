"""Cores and threads: affinity, quotas of both kinds of control group, and what the environment says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpillm.comm.cores import Cores, binding, cores_of_time, cpu_quota, node_cores, physical, threads_per_rank
from mpillm.errors import JobError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_process() -> None:
    assert Cores.of_this_process().affinity == physical(os.sched_getaffinity(0), Path("/"))
    assert not Cores.of_this_process().launcher  # pytest is no mpiexec


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    siblings = ["0,4", "1,5", "2-3", "2-3", "0,4", "1,5"]
    write(tmp_path, {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{text}\n"
        for cpu, text in enumerate(siblings)
    })  # fmt: skip
    assert physical(range(6), tmp_path) == {0, 1, 2}
    assert physical([3, 4], tmp_path) == {2, 0}
    assert physical([6, 7], tmp_path) == {6, 7}  # not told


def test_what_mpiexec_bound_away() -> None:
    there = frozenset(range(16))
    bound = [Cores(frozenset({rank}), launcher=there) for rank in range(2)]
    assert binding(bound).startswith("mpiexec bound the ranks to 2 of 16 cores")
    assert not binding([Cores(there, launcher=there)] * 2)
    assert not binding([Cores(frozenset({0}))])  # srun, or nobody: as asked for


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    write(tmp_path, {
        "proc/self/cgroup": "0::/job/step/task\n",
        "sys/fs/cgroup/job/cpu.max": "800000 100000\n",
        "sys/fs/cgroup/job/step/cpu.max": "350000 100000\n",
        "sys/fs/cgroup/job/step/task/cpu.max": "max 100000\n",
    })  # fmt: skip
    quota, where = cpu_quota(tmp_path)
    assert quota == 3.5
    assert where.endswith("/job/step")


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path, {
        "proc/self/cgroup": "5:cpuacct,cpu:/box\n4:memory:/other\n0::/\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    assert cpu_quota(tmp_path) == (2.0, str(tmp_path / "sys/fs/cgroup/cpu/box"))


def test_in_a_container_the_top_group_counts(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/not/here\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"})
    assert cpu_quota(tmp_path)[0] == 1.5


@pytest.mark.parametrize("text", ["nonsense\n", "1 0\n", "max 100000\n", ""])
def test_no_quota(tmp_path: Path, text: str) -> None:
    assert cpu_quota(tmp_path) == (0.0, "")
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})
    assert cpu_quota(tmp_path) == (0.0, "")


def test_cores_of_a_node() -> None:
    free, bound = frozenset(range(8)), [frozenset({0, 1}), frozenset({4, 5})]
    assert node_cores([Cores(free)] * 3) == 8
    assert node_cores([Cores(affinity) for affinity in bound]) == 4
    assert node_cores([Cores(free, 3.5, "/job")] * 4) == 3  # one quota for all
    assert node_cores([Cores(free, 2.0, f"/task{rank}") for rank in range(3)]) == 6  # one each
    assert node_cores([Cores(free, 2.0, "/task"), Cores(free)]) == 8  # one is not limited
    assert node_cores([Cores(free, 0.5, "/small")]) == 1
    assert cores_of_time([Cores(free, 0.5, "/small")]) == 0.5


@pytest.mark.parametrize(("asked", "environ", "expected"), [
    ("auto", {}, 3),
    ("auto", {"OMP_NUM_THREADS": "5", "SLURM_CPUS_PER_TASK": "7"}, 5),
    ("auto", {"OMP_NUM_THREADS": "4,2"}, 4),
    ("auto", {"OMP_NUM_THREADS": "", "SLURM_CPUS_PER_TASK": "7"}, 7),
    (2, {"OMP_NUM_THREADS": "5"}, 2),
])  # fmt: skip
def test_threads_per_rank(asked: int | str, environ: dict[str, str], expected: int) -> None:
    assert threads_per_rank(asked, 12, 4, environ) == expected
    assert threads_per_rank("auto", 2, 4, {}) == 1


@pytest.mark.parametrize(("asked", "environ", "words"), [
    (0, {}, r"layout\.threads = 0 is not a number of threads: give a whole number, at least 1\."),
    ("auto", {"OMP_NUM_THREADS": "all"}, r"OMP_NUM_THREADS = 'all' is not"),
    ("auto", {"SLURM_CPUS_PER_TASK": "-1"}, r"SLURM_CPUS_PER_TASK = '-1' is not"),
])  # fmt: skip
def test_what_is_no_number_of_threads(asked: int | str, environ: dict[str, str], words: str) -> None:
    with pytest.raises(JobError, match=words):
        threads_per_rank(asked, 8, 2, environ)


@pytest.mark.parametrize(("oversubscribed", "given", "expected"), [
    (False, {}, {"GOMP_SPINCOUNT": "4000"}),
    (True, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
    (False, {"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9"}),
    (True, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    (False, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "30000000000"}),
    (True, {"OMP_STACKSIZE": "3M"}, {"OMP_STACKSIZE": "3145728"}),
])  # fmt: skip
def test_what_openmp_hears(oversubscribed: bool, given: dict[str, str], expected: dict[str, str]) -> None:
    """The variables are set before libgomp is loaded; it tells what it has understood."""
    program = (
        f"from mpillm.comm import cores; print(cores.configure_openmp({oversubscribed})); "
        f"import mpillm.kernels; print(cores.configure_openmp({oversubscribed}))"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environ, **given, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "GOMP_" not in done.stderr:
        pytest.skip("the kernels are not compiled, or with another OpenMP than libgomp")
    assert done.stdout.split() == ["True", "False"]
    heard = dict(re.findall(r"(?m)^ *(?:\[\w+\] )?(\w+) *= *'(.*)'", done.stderr))
    expected = {"OMP_STACKSIZE": "4194304", **expected}
    assert {name: heard[name] for name in expected} == expected
