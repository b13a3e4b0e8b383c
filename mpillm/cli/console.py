"""Print to a terminal or a log file: progress and the summary on stderr, answers on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpillm.cli import terminal
from mpillm.cli.progress import BEFORE, LINES, LIVE, Live, ProgressLines, Rates, width
from mpillm.cli.streams import visible
from mpillm.run.progress import Bar
from mpillm.store import report
from mpillm.words import count_of

FEW, SOME = 8, 3  # answers shown: all of a few, some of many and the first error
ANSWERED = '"status_code":200'
LONGEST = 400  # characters of an answer shown


class Console:
    """A `Progress` that prints for people."""

    def __init__(self, speaks: Callable[[], bool] = lambda: True) -> None:
        """`speaks` says whether this process prints now: when rank 0 is lost, another one takes over."""
        self._speaks = speaks
        self._live = sys.stderr.isatty()
        self._download: tqdm | None = None
        self._said = time.monotonic()
        self._rates: Rates | None = None  # of the run, which begins again after a lost rank

    def say(self, line: str) -> None:
        """Print a line on stderr, on rank 0 only."""
        if self._speaks():
            tqdm.write(f"mpillm: {line}", file=sys.stderr)

    def downloading(self, done: int, total: int) -> None:
        """Show a bar of bytes."""
        self._bytes("model", done, total)

    def packing(self, done: int, total: int) -> None:
        """Show a bar of the bytes of rank 0, whose share is about as large as the others'."""
        self._bytes("packing", done, total)

    def _bytes(self, what: str, done: int, total: int) -> None:
        if not self._speaks():
            return
        if not self._live:
            self._bytes_in_lines(what, done, total)
            return
        if self._download is None:
            self._download = tqdm(
                total=total or None,
                desc=what,
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                mininterval=LIVE,
                dynamic_ncols=True,
            )
        self._download.update(done - self._download.n)
        if total and done >= total:
            self._download.close()
            self._download = None

    def _bytes_in_lines(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now > self._said + LINES or (total and done >= total):
            self._said = now
            self.say(f"{what}: {done / 1e6:.0f}{f' of {total / 1e6:.0f}' if total else ''} MB")

    @contextmanager
    def requests(self, total: int, done: int, tokens: int, since: float) -> Iterator[Bar]:
        """Show requests, rates, the time since `since` and the time left; `tokens` of before count for no rate."""
        self._rates = rates = self._rates or Rates(tokens)
        if not (total and self._live and self._speaks()):  # a live line of no requests would tell nothing
            yield ProgressLines(total, self.say, done, rates)
            return
        with tqdm(
            total=total, initial=done, bar_format=BEFORE, smoothing=0, file=sys.stderr, ncols=width()
        ) as bar:
            bar.start_t -= time.monotonic() - since
            yield Live(bar, rates)

    def finish(self, made: report.Report, directory: Path) -> None:
        """Print the answers (the first ones, if there are many), the summary, and where the results are."""
        path = directory / "results.jsonl"
        try:
            _show_answers(path, made.requests)
        except Exception as error:  # the results are on disk, and no display decides what came of the run
            print(f"mpillm: The answers in {path} cannot be printed ({error}).", file=sys.stderr)
        # Two streams may arrive in any order, and the summary is the last thing to be read.
        stream = sys.stdout if terminal.both_streams_meet() else sys.stderr
        sys.stdout.flush()
        from mpillm.store import report_page  # loaded at the end, as others look at the answers

        for line in report_page.summary(made):
            print(f"mpillm: {line}", file=stream)
        print(f"mpillm: The results are in {path}.", file=stream)
        stream.flush()


def _show_answers(path: Path, requests: report.Requests) -> None:
    first, shown, error_shown = (FEW if requests.total <= FEW else SOME), 0, not requests.errors
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):  # one at a time, for a line may be large
            is_error = ANSWERED not in line
            if number < first or (is_error and not error_shown):
                print(terminal.fitted(_answer(json.loads(line)), sys.stdout))
                shown += 1
                error_shown |= is_error
            if number + 1 >= first and error_shown:
                break
    if requests.total > shown:
        print(f"... and {requests.total - shown} more in {path}")


def _answer(result: dict[str, Any]) -> str:
    """Return one line of results.jsonl for people."""
    body = result["response"]["body"]
    if "error" in body:
        texts = [f"ERROR: {body['error']['message']}"]
    elif "data" in body or "results" in body:
        texts = [_item(item) for item in body.get("data") or body["results"]]
    elif "best" in body:
        texts = [f"{choice['probability']:.4g} for {choice['text']}" for choice in body["choices"]]
    elif not body["usage"].get("completion_tokens"):
        texts = [_score(choice) for choice in body["choices"]]
    else:
        texts = [_text(choice) for choice in body["choices"]]
    shown = [_shortened(text) for text in texts]
    return f"{visible(result['custom_id'])}: " + " | ".join(shown)


def _item(item: dict[str, Any]) -> str:
    """Return a vector, a score, or a label."""
    if "embedding" in item:
        return _embedding(item["embedding"])
    if "label" in item:
        return f"{item['label']} ({max(item['probs']):.4g})"
    score = item["score"] if "score" in item else item["relevance_score"]
    return f"{item['index']}: {score:.4g}"


def _text(choice: dict[str, Any]) -> str:
    text: str = choice.get("text") or choice.get("message", {}).get("content") or ""
    return text


def _score(choice: dict[str, Any]) -> str:
    """Return the sum of a prompt's log-probabilities, from its second token on."""
    logprobs = [
        value for value in (choice.get("logprobs") or {}).get("token_logprobs", ()) if value is not None
    ]
    if not logprobs:
        return _text(choice)
    return f"logprob {sum(logprobs):.4f} of {count_of(len(logprobs), 'token')}: {_text(choice)}"


def _shortened(text: str) -> str:
    """Return the beginning of a text, in one line."""
    words = " ".join(text[: 2 * LONGEST].split())
    if len(words) <= LONGEST and len(text) <= 2 * LONGEST:
        return words
    cut = words.rfind(" ", 0, LONGEST - 3)
    return f"{words[: cut if cut > 0 else LONGEST - 4]} ..."


def _embedding(embedding: list[float] | str) -> str:
    if isinstance(embedding, str):
        return f"an embedding of {len(embedding)} base64 characters"
    begin = ", ".join(f"{value:.4f}" for value in embedding[:4])
    return f"embedding of {count_of(len(embedding), 'value')}: {begin}, ..."
