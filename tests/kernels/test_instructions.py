"""Products on Arm take the instructions that they did: a compiler that puts sums in memory doubles them."""

from __future__ import annotations

import shutil

import pytest

from tests.kernels import instructions, programs

pytestmark = pytest.mark.timeout(1800)
BOUNDS = {  # type, rows of activations: instructions for 64 products, gcc 12's and a tenth
    ("BF16", 1): 70.0,
    ("Q8_0", 1): 12.0,
    ("Q8_0", 32): 9.1,
    ("Q4_K", 1): 20.0,
    ("Q4_K", 32): 10.5,
}


def test_products_on_arm_take_few_instructions(tmp_path_factory: pytest.TempPathFactory) -> None:
    for tool in (programs.ARM, instructions.EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    program = programs.program_of(programs.ARM, tmp_path_factory, "products")
    found = {case: instructions.count(program, programs.COUNTED, *case) for case in BOUNDS}
    assert all(found[case] <= bound for case, bound in BOUNDS.items()), found
