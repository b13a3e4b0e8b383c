"""What `table.py` starts on all ranks: times the engine there and counts what leaves each host's interface.

    mpiexec -n 2 python -m tests.cluster.ranks MODEL '{"shards": 2, "activations": "auto"}' BEGAN PROMPT TOKENS

BEGAN is the time at which mpiexec was started. Rank 0 prints a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from mpillm.comm.program import guard
from mpillm.comm.world import World

TURNS = 3


@dataclasses.dataclass
class Measured:
    """Medians; bytes and memory of each host, in the order of the hosts."""

    prefill: float  # tokens/s
    decode: float  # tokens/s
    first: float  # seconds from the start to the first token
    sent: list[float]  # bytes that leave the interface for a decoded token
    memory: list[int]  # bytes that were resident at most
    layout: str = ""  # stages x shards, and the wire between shards


def sent() -> int:
    """Bytes that this host's interface has sent; 0 where there is none."""
    lines = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()]
    return next((int(of[1].split()[8]) for of in lines if of[0].strip() == "eth0"), 0)


def main(world: World) -> int:
    # What imports mpi4py comes after `guard` has started MPI, as on the command line: it knows what to leave out.
    from mpillm.bench.runs import prompts_of, run_steps
    from mpillm.planning.memory import peak
    from mpillm.run.session import Session
    from tests.model.engine_harness import spec_of

    path, settings, began, prompt, tokens = sys.argv[1:]
    job = {"threads": 1, "kv": "256MiB", "max_context": 512, "speculation": "off", **json.loads(settings)}
    prefill, decode = [], []
    with closing(Session(world, spec_of(Path(path), **job), Path(path))) as session:
        prompts = prompts_of(1, int(prompt), session.config.vocab)
        run_steps(session, prompts, 1)
        first = time.time() - float(began)
        carried = []
        for turn in range(TURNS + 1):  # the first one warms up
            counts = [sent()]
            of_prompt = run_steps(session, prompts, 1)
            world.barrier()
            counts.append(sent())
            alone = [step for step in run_steps(session, prompts, int(tokens)) if not step.prompt]
            world.barrier()
            counts.append(sent())
            if turn:
                carried.append((counts[2] - counts[1] - (counts[1] - counts[0])) / (int(tokens) - 1))
                if world.rank == 0:
                    prefill.append(int(prompt) / sum(step.seconds for step in of_prompt))
                    decode.append(1 / median(step.seconds for step in alone))
        place = session.place
        layout = f"{place.stages} x {place.shards} {session.wire}"
    everyone = world.gather((median(carried), peak()))
    if world.rank == 0:
        bytes_sent, memory = map(list, zip(*everyone, strict=True))
        made = Measured(median(prefill), median(decode), first, bytes_sent, memory, layout)
        print(json.dumps(dataclasses.asdict(made)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
