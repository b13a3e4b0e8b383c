"""`python -m tests.chaos --disturbances 500 --seed S`: the chaos harness for as long as one likes."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.harness import Chaos
from tests.conftest import FINDERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--disturbances", type=int, default=20, metavar="N", help="how many (20)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of kinds and moments (the time)")
    parser.add_argument("--mpi", choices=sorted(FINDERS), default="openmpi", help="openmpi, or mpich")
    options = parser.parse_args()
    mpi = FINDERS[options.mpi]()
    if mpi is None:
        parser.error(f"there is no {options.mpi} (see tests/conftest.py)")
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(mpi, Path(folder), options.seed, lambda line: print(line, flush=True))
        counts = chaos.run(options.disturbances)
        print(counts)
        sys.exit(1 if counts.wrong else 0)


if __name__ == "__main__":
    main()
