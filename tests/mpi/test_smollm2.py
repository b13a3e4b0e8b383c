"""SmolLM2 on 2 and 4 ranks: near llama.cpp with either wire, and 73.4 % fewer bytes with Q8_0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Mpi
from tests.model.test_smollm2 import smollm2

PROGRAM = Path(__file__).with_name("smollm2.py")


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize(("stages", "shards"), [(1, 2), (2, 1), (1, 4), (4, 1)])
def test_near_llama_cpp_and_few_bytes(stages: int, shards: int, openmpi: Mpi) -> None:
    smollm2()  # skips where there is none
    done = openmpi.run(stages * shards, PROGRAM, str(stages), str(shards), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    off = json.loads(done.stdout)
    print(off)  # the figures that notes quote
    assert 1 - off["q8_0"]["bytes"] / off["f32"]["bytes"] == pytest.approx(0.734, abs=5e-4)
