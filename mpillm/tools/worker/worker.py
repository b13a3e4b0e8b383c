"""The loop of a worker: a root connects, describes its part, and then asks for one step after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from mpillm.tools.worker.arrays import Arrays
from mpillm.tools.worker.graph import FROM_ROOT, SLICES, SLICES_TO_ROOT, Graph, read_graph
from mpillm.tools.worker.link import Link, RootLostError, StrangeRootError, close, listen, meet
from mpillm.tools.worker.operations import prepare
from mpillm.words import count_of

log = logging.getLogger(__name__)

POSITIONS = 0  # the pipe of each row's position


def serve(host: str, port: int, threads: int, say: Callable[[str], None]) -> None:
    """Work for one root after the other, until the process is stopped.

    While it works for one, others cannot connect. A root that vanishes is reported, and the next one awaited; one that
    is of another version, or no root, ends in a StrangeRootError.
    """
    while True:
        with listen(host, port) as server:
            say(f"A root may connect to {host}:{port}.")
            try:
                links = meet(server)
            except RootLostError as lost:
                say(f"{lost} Nothing was computed.")
                continue
        try:
            graph = read_graph(links[0])
            say(f"Node {graph.node} of {graph.nodes} has its weights.")
            steps = work(graph, links, threads)
            say(f"The root has finished after {count_of(steps, 'step')}.")
        except RootLostError as lost:
            say(f"{lost} Start the root again.")
        finally:
            close(links)


def work(graph: Graph, links: list[Link], threads: int) -> int:
    """Compute steps until the root wants no more; how many there were."""
    arrays = Arrays(graph)
    segments = [
        ([prepare(operation, arrays, threads) for operation in segment.operations], segment.syncs)
        for segment in graph.segments
    ]
    steps = 0
    while True:
        position, rows = links[0].numbers("II")
        if not rows:
            return steps
        if rows > graph.rows:
            raise StrangeRootError(f"{links[0].who} asks for {rows} rows, of {graph.rows} that it announced.")
        arrays.pipes[POSITIONS].reshape(-1)[:rows] = np.arange(position, position + rows)
        for operations, syncs in segments:
            for operation in operations:
                operation(rows)
            for pipe, kind in syncs:
                _exchange(arrays, pipe, kind, rows, links)
        steps += 1


def _exchange(arrays: Arrays, pipe: int, kind: int, rows: int, links: list[Link]) -> None:
    """Row by row, as all nodes do it: whole rows from the root, or each node's slice to all or to the root alone."""
    graph = arrays.graph
    for row in arrays.pipes[pipe][0, :rows]:
        data = memoryview(row.view(np.uint8))
        if kind == FROM_ROOT:
            links[0].read_into(data)
            continue
        if kind not in (SLICES, SLICES_TO_ROOT):
            raise StrangeRootError(f"{links[0].who} exchanges rows in the way {kind}, which is unknown.")
        width = len(data) // graph.nodes
        own = data[width * graph.node : width * (graph.node + 1)]
        for link in links if kind == SLICES else links[:1]:
            link.write(own)
        if kind == SLICES:
            for number, link in enumerate(links):
                node = number + (number >= graph.node)
                link.read_into(data[width * node : width * (node + 1)])
