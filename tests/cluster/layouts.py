"""What mpillm chooses beside other layouts, measured on nine clusters: `python -m tests.cluster.layouts --model PATH`.

As in `table.py` hosts are network namespaces with a thread each (root; minutes for a job on a cluster). More
hosts than cores share them, which real machines do not: with `--core` each host is a machine with a part of a core.
That is right for many answers. Of one answer the stages compute in turn, and each of them is as fast as a whole core.
`tests/planning/test_clusters.py` asks the same of the model of the time, on paper.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.cluster.compare import ROUNDS, compare
from tests.cluster.hosts import Hosts, missing
from tests.cluster.table import QUOTA, Cluster, limited
from tests.conftest import FINDERS

# Hosts, the rate of their cables in tc's words, and whether the second one has a third of a core.
CLUSTERS = [
    (2, "1gbit", False),
    (2, "1gbit", True),
    (2, "100mbit", False),
    (2, "100mbit", True),
    (2, "10mbit", False),
    (3, "1gbit", False),
    (4, "1gbit", False),
    (4, "100mbit", False),
    (3, "100mbit", False),
]


def main() -> None:
    """Run the jobs, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.layouts", description=__doc__)
    parser.add_argument("--model", type=Path, action="append", required=True, help="once or more often")
    parser.add_argument("--lines", type=int, action="append", help="of a job (1 and 32)")
    parser.add_argument(
        "--cluster", type=int, action="append", choices=range(len(CLUSTERS)), help="these alone"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each layout, which take turns")
    parser.add_argument("--core", type=float, help="the part of a core that each host has of its own")
    options = parser.parse_args()
    mpi = FINDERS["openmpi"]()
    if (reason := missing()) or mpi is None:
        parser.error(reason or "there is no Open MPI")
    parts = []
    for number in options.cluster or range(len(CLUSTERS)):
        count, rate, slow = CLUSTERS[number]
        with (
            tempfile.TemporaryDirectory(prefix="layouts-") as name,
            Hosts(Path(name), count, rate).up() as hosts,
        ):
            cluster = Cluster(hosts, mpi, Path(name))
            quotas = {}
            if options.core:
                hosts.apart()
                quotas = dict.fromkeys(hosts.numbers, options.core)
            if slow:
                quotas[2] = QUOTA * (options.core or 1.0)
            with limited(hosts, quotas):
                for model in options.model:
                    label = f"{count} hosts, {rate}{', one slow' if slow else ''}, {model.name}:"
                    parts += [
                        compare(cluster.job, Path(name), model, count, lines, label, options.rounds)
                        for lines in options.lines or (1, 32)
                    ]
    print(f"auto reaches at least {min(parts):.2f} of the best of its job; in {len(parts)} jobs", flush=True)


if __name__ == "__main__":
    main()
