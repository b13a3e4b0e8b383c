"""The kernels' threads are OpenMP's: seen by tools, limited by nobody else, and without harm after a fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpillm import kernels
from tests.conftest import HANGS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of Linux"),
    pytest.mark.skipif(kernels.available() == ("numpy",), reason="the extension is not built"),
]

START = """
import os
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
from mpillm import kernels
from tests.kernels import cases

def threads():
    return len(os.listdir("/proc/self/task"))

def results(threads):
    rng = np.random.default_rng(5)
    batch = [cases.product(rng, kernels.BlockType.Q8_0, 400, 320, 5, threads),
             cases.attention(rng, kernels.BlockType.F16, 64, heads=6, kvh=2, window=0, rows=40, threads=threads)]
    return [array.tobytes() for case in batch for array in case.run()]

alone, before = results(1), threads()
if not any(info["user_api"] == "openmp" for info in threadpool_info()):
    print("no OpenMP")
    raise SystemExit
"""


def run(program: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + program], env={**os.environ, **env}, capture_output=True, text=True,
        timeout=HANGS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if done.stdout == "no OpenMP\n":
        pytest.skip("the kernels were built without OpenMP")


def test_a_call_has_the_threads_it_asks_for() -> None:
    """Whatever limit somebody sets for libraries in this process, NumPy's or OpenMP's."""
    run("""
with threadpool_limits(1):
    assert results(3) == alone
assert threads() == before + 2, (threads(), before)
""", OMP_NUM_THREADS="1")  # fmt: skip


def test_the_child_of_a_fork_computes() -> None:
    run("""
import signal
assert results(3) == alone
child = os.fork()
if not child:
    signal.alarm(60)
    os._exit(results(3) != alone)
assert os.waitpid(child, 0)[1] == 0
assert results(3) == alone
""")


def test_small_stacks() -> None:
    run("assert results(4) == alone", OMP_STACKSIZE="128k")


def test_threads_that_do_not_start_are_an_error() -> None:
    """libgomp would end the process; with the memory for their stacks the same call computes."""
    run("""
import errno, resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 10), -1))
try:
    results(64)
except OSError as error:
    assert error.errno == errno.EAGAIN and "64 threads do not start" in str(error), error
else:
    raise AssertionError("64 stacks without memory")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert results(64) == alone
""")
