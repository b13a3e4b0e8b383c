"""What the order of lines and choosing among answers are worth: `python -m tests.batch.throughput`.

A random model of four layers computes each input on one rank with one thread, in turns, and each line of output has
the median of CPU seconds, so that it can be read on a busy machine too. Results are the same bytes in each order.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mpillm.batch.answers import result_line
from mpillm.batch.order import Order
from mpillm.batch.work import Model, Work
from mpillm.comm.program import start
from mpillm.comm.world import World
from mpillm.engine.engine import Engine
from mpillm.engine.limits import Totals
from mpillm.engine.request import FinishedCompletion
from mpillm.kernels import KV_BLOCK
from mpillm.run.session import Session
from tests.job_helpers import works
from tests.model.engine_harness import spec_of
from tests.weights.build import Tiny, write_hf

SHAPE = Tiny(hidden=256, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=32, intermediate=768, vocab=2000)
MODEL = Model(vocab=SHAPE.vocab, max_position=2048)
SEQUENCES, BLOCKS = 16, 160  # of a step, and of the KV cache, which holds a part of what the lines begin with
SCORED = {"max_tokens": 0, "echo": True, "logprobs": 0}
Body = dict[str, Any]


def _ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(SHAPE.vocab) for _ in range(count)]


def few_shot(draw: random.Random, count: int) -> list[Body]:
    """Questions of sixteen tasks with two answers each to choose from, behind the examples of their task."""
    tasks = [_ids(draw, 12 * KV_BLOCK) for _ in range(16)]
    return [
        {"prompt": draw.choice(tasks) + _ids(draw, 12), "choices": [_ids(draw, 1), _ids(draw, 2)]}
        for _ in range(count)
    ]


def documents(draw: random.Random, count: int) -> list[Body]:
    """Four questions about each of some documents."""
    texts = [_ids(draw, 12 * KV_BLOCK) for _ in range(max(count // 4, 1))]
    asked = [{"prompt": texts[at % len(texts)] + _ids(draw, 9), "max_tokens": 16} for at in range(count)]
    draw.shuffle(asked)
    return asked


def chats(draw: random.Random, count: int) -> list[Body]:
    """Chats behind one of two system prompts, with answers of very different lengths."""
    systems = [_ids(draw, 3 * KV_BLOCK) for _ in range(2)]
    return [
        {
            "prompt": draw.choice(systems) + _ids(draw, draw.randrange(10, 200)),
            "max_tokens": int(2 ** draw.uniform(1, 8)),
        }
        for _ in range(count)
    ]


def labels(draw: random.Random, count: int) -> dict[str, list[Body]]:
    """Records with three labels: as choices, and scored one by one; and with one of the labels each."""
    choices = [_ids(draw, length) for length in (2, 1, 3)]
    prompts = [_ids(draw, draw.randrange(20, 60)) for _ in range(count)]
    return {
        "choices": [{"prompt": prompt, "choices": choices} for prompt in prompts],
        "scored": [{"prompt": [prompt + label for label in choices], **SCORED} for prompt in prompts],
        "one label": [{"prompt": prompt + choices[0], **SCORED} for prompt in prompts],
    }


def in_best_order(made: Sequence[Work]) -> list[Work]:
    """The order in which a run with this cache computes them."""
    order = Order(BLOCKS * KV_BLOCK)
    for work in made:
        order.add(work)
    return [made[index] for index in order.indices()]


def _least_steps(made: Sequence[Work], totals: Totals) -> int:
    """As many steps as any order takes: each draws a token of `SEQUENCES` sequences at most, of each one."""
    longest = max(request.max_tokens for work in made for request in work.requests)
    return max(-(-totals.generated_tokens // SEQUENCES), longest)


def computed(world: World, model: Path, made: Sequence[Work]) -> tuple[float, dict[str, bytes], Totals]:
    """The CPU seconds, the line of results.jsonl of each work, and the engine's counts."""
    lines: dict[str, bytes] = {}
    left = {work.custom_id: work for work in made}
    found: dict[str, list[FinishedCompletion]] = {}
    kv = BLOCKS * KV_BLOCK * SHAPE.n_layers * 2 * SHAPE.n_kv_heads * SHAPE.head_dim * 4
    settings = {"threads": 1, "kv": kv, "max_num_seqs": SEQUENCES, "speculation": "off"}
    with closing(Session(world, spec_of(model, **settings), model)) as session:
        engine = Engine(session.worker, session.channel, session.limits, session.shard_vocab)
        began = time.process_time()
        for finished in engine.run(request for work in made for request in work.requests):
            for one in finished:
                of = found.setdefault(one.request.id, [])
                of.append(one)
                if len(of) == len(left[one.request.id].requests):
                    work = left.pop(one.request.id)
                    ordered = sorted(found.pop(work.custom_id), key=lambda each: each.request.choice)
                    lines[work.custom_id] = result_line(work, ordered, MODEL)
        seconds = time.process_time() - began
        engine.stop(0)
    assert not left
    return seconds, lines, engine.totals


def measured(world: World, model: Path, inputs: dict[str, list[Work]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each input, which are computed in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in inputs}
    for _ in range(rounds):
        for name, made in inputs.items():
            seconds[name].append(computed(world, model, made)[0])
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main(count: int, rounds: int) -> None:
    world = start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_hf(folder / "model", SHAPE.weights(), SHAPE.config())
        for kind in (few_shot, documents, chats):
            made = works(folder, *kind(random.Random(1), count), model=MODEL)
            inputs = {"as given": made, "ordered": in_best_order(made)}
            (_, lines, given), (_, same, best) = (
                computed(world, model, inputs[name]) for name in ("as given", "ordered")
            )
            assert lines == same
            taken = measured(world, model, inputs, rounds)
            sys.stdout.write(
                f"{kind.__name__}: {taken['as given']:.2f} s as given, {taken['ordered']:.2f} s ordered, "
                f"{taken['as given'] / taken['ordered']:.2f} times as fast; prompt tokens "
                f"{given.prompt_tokens + given.recomputed_tokens} and {best.prompt_tokens + best.recomputed_tokens}, "
                f"steps {given.steps} and {best.steps} of at least {_least_steps(made, given)}\n"
            )
            sys.stdout.flush()
        bodies = labels(random.Random(2), count)
        inputs = {name: works(folder, *lines, model=MODEL) for name, lines in bodies.items()}
        taken = measured(world, model, inputs, rounds)
        rates = ", ".join(f"{name} {count / seconds:.0f}" for name, seconds in taken.items())
        sys.stdout.write(f"requests per CPU second: {rates}\n")


if __name__ == "__main__":
    main(*(int(word) for word in [*sys.argv[1:], *("96", "3")[len(sys.argv) - 1 :]]))
