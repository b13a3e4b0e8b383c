"""What a run prints to a terminal or a log file: progress and the summary on stderr, answers on stdout."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpillm.cli.streams import visible
from mpillm.run.progress import Bar
from mpillm.store import report

# Under mpiexec stderr is a pipe that leads to a terminal or to a file, so that updates must be rare.
SECONDS_BETWEEN = {True: 0.2, False: 2.0}
FEW, SOME = 8, 3  # answers shown: all of a few, some of many
LONGEST = 400  # characters of an answer shown


class _Bar:
    """A tqdm bar that shows tokens per second, of prompts and generated ones together."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def update(self, answered: int, tokens: int) -> None:
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed > 0:
            self._bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
        self._bar.update(answered)


class Console:
    """A `Progress` that prints for people."""

    def __init__(self, speaks: Callable[[], bool] = lambda: True) -> None:
        """`speaks` says whether this process prints now: when rank 0 is lost, another one takes over."""
        self._speaks = speaks
        self._download: tqdm | None = None

    def say(self, line: str) -> None:
        """Print a line on stderr, on rank 0 only."""
        if self._speaks():
            tqdm.write(f"mpillm: {line}", file=sys.stderr)

    def downloading(self, done: int, total: int) -> None:
        """A bar of bytes."""
        self._bytes("model", done, total)

    def packing(self, done: int, total: int) -> None:
        """A bar of the bytes of rank 0, whose share is about as large as the others'."""
        self._bytes("packing", done, total)

    def _bytes(self, what: str, done: int, total: int) -> None:
        if not self._speaks():
            return
        if self._download is None:
            self._download = self._bar(total=total or None, desc=what, unit="B", unit_scale=True)
        self._download.update(done - self._download.n)
        if total and done >= total:
            self._download.close()
            self._download = None

    @contextmanager
    def requests(self, total: int) -> Iterator[Bar]:
        """A bar of requests, with rate and time left."""
        with self._bar(total=total, desc="requests", unit="req") as bar:
            yield _Bar(bar)

    def finish(self, made: report.Report, directory: Path) -> None:
        """Print the answers (the first ones, if there are many), the summary, and where the results are."""
        path = directory / "results.jsonl"
        with path.open(encoding="utf-8") as lines:
            shown = FEW if made.requests.total <= FEW else SOME
            for line in itertools.islice(lines, shown):
                print(_answer(json.loads(line)))
        if made.requests.total > shown:
            print(f"... and {made.requests.total - shown} more in {path}")
        sys.stdout.flush()
        for line in report.summary(made):
            self.say(line)
        self.say(f"The results are in {path}.")

    def _bar(self, **settings: object) -> tqdm:
        return tqdm(
            file=sys.stderr,
            disable=not self._speaks(),
            mininterval=SECONDS_BETWEEN[sys.stderr.isatty()],
            dynamic_ncols=sys.stderr.isatty(),
            **settings,
        )


def _answer(result: dict[str, Any]) -> str:
    """One line of results.jsonl for people."""
    body = result["response"]["body"]
    if "error" in body:
        texts = [f"ERROR: {body['error']['message']}"]
    elif "data" in body:
        texts = [_described(item["embedding"]) for item in body["data"]]
    else:
        texts = [
            choice.get("text") or choice.get("message", {}).get("content") or "" for choice in body["choices"]
        ]
    shown = [_shortened(text) for text in texts]
    return f"{visible(result['custom_id'])}: " + " | ".join(shown)


def _shortened(text: str) -> str:
    """The beginning of a text, in one line."""
    words = " ".join(text[: 2 * LONGEST].split())
    if len(words) <= LONGEST and len(text) <= 2 * LONGEST:
        return words
    cut = words.rfind(" ", 0, LONGEST - 3)
    return f"{words[: cut if cut > 0 else LONGEST - 4]} ..."


def _described(embedding: list[float] | str) -> str:
    if isinstance(embedding, str):
        return f"an embedding of {len(embedding)} base64 characters"
    begin = ", ".join(f"{value:.4f}" for value in embedding[:4])
    return f"[{begin}, ...] ({len(embedding)} numbers)"
