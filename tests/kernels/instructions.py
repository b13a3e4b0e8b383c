"""How many instructions a product takes on Arm, counted under an emulator: no board is needed.

    python -m tests.kernels.instructions Q4_0 Q8_0 --rows 1 32

prints for each type and number of rows of activations the instructions for 64 products, of a matrix of 2,048
columns in 8 panels. Needs what test_emulated.py needs. The emulator logs a line an instruction; two products
less one leave the loops.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from tests.kernels import programs

EMULATOR = "qemu-aarch64-static"
COLUMNS, UNIT = 2048, 64


def count(program: Path, path: str, kind: str, rows: int) -> float:
    """Instructions for 64 products of weights of a type with so many rows."""
    weights = 256 if rows == 1 else 32

    def lines(times: int) -> int:
        command = [EMULATOR, "-cpu", "max", "-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout"]
        arguments = [str(program), path, kind, str(COLUMNS), str(weights), str(rows), str(times)]
        with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            found = sum(piece.count(b"\n") for piece in iter(lambda: run.stdout.read(1 << 20), b""))
        assert run.returncode == 0, (path, kind, rows)
        return found

    return (lines(2) - lines(1)) * UNIT / (COLUMNS * weights * rows)


def main() -> None:
    """Print the table that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="+")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--path", default=programs.COUNTED)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        program = programs.build(programs.ARM, Path(scratch), "products", given.path)
        for kind in given.types:
            for rows in given.rows:
                print(f"{kind} {rows}: {count(program, given.path, kind, rows):.2f}", flush=True)


if __name__ == "__main__":
    main()
