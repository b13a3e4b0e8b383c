"""Run under mpiexec: `tests.agnostic.program` with recurrent layers. The first argument is their numbers, or none."""

from __future__ import annotations

import sys

import pytest

from mpillm.comm.program import guard
from tests.agnostic import program
from tests.model.recurrent import install

if __name__ == "__main__":
    layers = sys.argv.pop(1)
    if layers != "none":
        install(pytest.MonkeyPatch(), frozenset(map(int, layers.split(","))), frozenset([0]))
    sys.exit(guard(program.main))
