"""Times answers that repeat much of their prompt, with and without drafts: tokens for each pass, and acceptance.

Every function is collective. Only rank 0 gets the measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import msgspec

from mpillm.bench.paging import with_budget
from mpillm.bench.result import Drafts, Run
from mpillm.bench.runs import BenchOptions
from mpillm.comm.world import World
from mpillm.engine.limits import Totals
from mpillm.engine.request import Request
from mpillm.engine.speculation import Mode
from mpillm.engine.worker import follow
from mpillm.errors import JobError
from mpillm.run.opened import model_of
from mpillm.run.session import Session
from mpillm.spec import BatchSection, DraftSection, Spec

Encode = Callable[..., list[int]]  # the `encode` of a tokenizer

TOKENS = 96  # tokens of an answer
LONGEST = 1024  # tokens of a text and its answer, at most
MODES: tuple[Mode, ...] = ("off", "prompt-lookup", "auto")

ARTICLE = """The harbour of Lindow was built in 1871 for the herring fleet. In 1911 more than two hundred boats landed
their catch there, and the railway carried it to the cities overnight. When the herring left in the 1930s, the fleet
shrank to a dozen boats, and the railway closed in 1963. Today the harbour is used by a ferry, a sailing school and a
research ship of the university, which measures the temperature of the sea every week.
"""
CODE = """def mean_of_rows(rows, skip_empty):
    total = 0.0
    count = 0
    for row in rows:
        if skip_empty and not row:
            continue
        for value in row:
            total += value
            count += 1
    if count == 0:
        return 0.0
    return total / count
"""
RECORDS = """Order 4417: Marta Lindqvist, 12 Harbour Road, Lindow, two brass hinges, 38.50 euros, paid.
Order 4418: Tomas Okafor, 7 Mill Lane, Easterby, one oak door, 412.00 euros, not paid.
Order 4419: Ines Carvalho, 90 Station Street, Lindow, six window catches, 61.20 euros, paid.
"""
TEXTS = {
    "summary": f"{ARTICLE}\nThe same article in its own words, without the years:\n\nThe harbour of Lindow was built",
    "code edit": f"{CODE}\n# The same function, where `total` is called `sum_of_values`:\n\ndef mean_of_rows(",
    "extraction": f"{RECORDS}\nAs JSON, one object for each order:\n"
    '{"order": 4417, "name": "Marta Lindqvist", "address": "12 Harbour Road, Lindow"',
}


def measure(
    world: World, spec: Spec, model: Path, options: BenchOptions
) -> Iterator[tuple[Run, tuple[int, int]]]:
    """Yield a run for each budget, context and text without drafts and in each way of drafting; and the layout."""
    longest = max(options.contexts) + LONGEST
    draft = DraftSection(model=options.draft)
    for budget in options.budgets or ("all",):
        with world.together():
            job = msgspec.structs.replace(
                spec, memory=msgspec.structs.replace(spec.memory, max_context=longest)
            )
            if budget != "all":
                job = with_budget(world, job, budget, 1, longest)
            job = msgspec.structs.replace(job, batch=BatchSection(max_num_seqs=1), draft=draft)
        with closing(Session(world, job, model)) as session:
            with world.together():
                encode = _encoder(session, model)
            for context in options.contexts:
                for name, text in TEXTS.items():
                    prompt = _prompt(encode, text, context)
                    maximum = min(session.limits.max_length, session.config.max_position)
                    if len(prompt) + TOKENS > maximum:
                        raise JobError(
                            f"The model takes {maximum} tokens, but a text with its answer has "
                            f"{len(prompt) + TOKENS}; lower --context."
                        )
                    for run in _measure(session, name, prompt, options.repeats):
                        yield run, (session.place.stages, session.place.shards)


def _encoder(session: Session, model: Path) -> Encode:
    tokenizer = model_of(session, model).text
    if tokenizer is None:
        raise JobError(
            f"{model} has no tokenizer, which the measurement of speculation needs; give another model."
        )
    return tokenizer.encode


def _prompt(encode: Encode, text: str, context: int) -> tuple[int, ...]:
    """Return the text after lines of other texts that make it `context` tokens, or the text alone if it has more."""
    own = encode(text)
    before: list[int] = []
    for number in range(1, context + 1):
        if len(before) + len(own) >= context:
            break
        line = f"Note {number}: the buoy at {number * 37 % 180} degrees was seen {number * 53 % 97} times.\n"
        before += encode(line, add_special=False)
    return (*before[: max(context - len(own), 0)], *own)


def _measure(session: Session, text: str, prompt: tuple[int, ...], repeats: int) -> list[Run]:
    """Return the answer without drafts and with them, in turns; the first turn warms up."""
    made = {
        mode: Run(
            what="speculation",
            threads=session.threads,
            sequences=1,
            tokens=len(prompt),
            text=text,
            drafts=mode,
        )
        for mode in MODES
    }
    seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
    answers: dict[Mode, list[int]] = {}
    for turn in range(-1, repeats):
        for mode, run in made.items():
            answers[mode], took, totals = _answer(session, prompt, mode)
            if turn >= 0:
                seconds[mode].append(took)
            run.per_pass = totals.generated_tokens / max(totals.turns, 1)
            run.drafters = {
                name: Drafts(drafted=count, accepted=totals.accepted[name])
                for name, count in totals.drafted.items()
            }
    if session.world.rank:
        return []
    assert all(answer == answers["off"] for answer in answers.values()), "drafts have changed an answer"
    for mode, run in made.items():
        run.budget = session.weights.budget
        run.seconds = median(seconds[mode]) / max(len(answers[mode]) - 1, 1)
        run.rate = 1.0 / run.seconds if run.seconds else 0.0
        run.gain = median(
            without / own for without, own in zip(seconds["off"], seconds[mode], strict=True) if own
        )
    return list(made.values())


def _answer(session: Session, prompt: Sequence[int], mode: Mode) -> tuple[list[int], float, Totals]:
    """Return a greedy answer, and the seconds from its first token to its last."""
    if session.world.rank:
        follow(session.worker, session.channel)
        return [], 0.0, Totals()
    engine, tokens, begin = session.engine(speculation=mode), list[int](), 0.0
    for finished in engine.run([Request("0", tuple(prompt), max_tokens=TOKENS)]):
        begin = begin or (time.perf_counter() if engine.totals.generated_tokens else 0.0)
        tokens += [token for one in finished for token in one.tokens]
    seconds = time.perf_counter() - begin
    engine.stop(0)
    return tokens, seconds, engine.totals
