"""The maximum length of answers that must be one of some texts or match a regular expression, before a run."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import NamedTuple

import msgspec

from mpillm.planning.grammar_memory import Asked
from mpillm.planning.token_count import TokenCounter
from mpillm.spec import Spec

UNKNOWN = sys.maxsize


class AnswerLength(NamedTuple):
    """The maximum number of tokens of an answer, and how many of them are drawn; the grammar forces the others."""

    tokens: int
    drawn: int


UNBOUNDED = AnswerLength(UNKNOWN, UNKNOWN)
KNOWN = 4096  # different grammars whose lengths are kept
_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<count>\d+)\}|\{\d+,(?P<most>\d+)\}|.", re.DOTALL)


class _Outputs(msgspec.Struct):
    choice: msgspec.Raw = msgspec.Raw()
    regex: msgspec.Raw = msgspec.Raw()


class AnswerLengths:
    """Finds the maximum number of tokens of answers, with the model's tokenizer."""

    def __init__(self, spec: Spec, counter: TokenCounter) -> None:
        self._counter = counter
        job = spec.sampling.structured_outputs
        self._of_job = UNBOUNDED if job is None else self._held(msgspec.json.encode(job))
        self._kept = lru_cache(KNOWN)(self._held)

    def most(self, body: Asked) -> AnswerLength:
        """Return the maximum length of an answer; UNBOUNDED without a grammar, or if the grammar sets no limit."""
        asked = {
            key: value
            for key in Asked.__struct_fields__
            if (value := bytes(getattr(body, key))) not in (b"", b"null")
        }
        if "guided_choice" in asked:
            return self._kept(b'{"choice":' + asked["guided_choice"] + b"}")
        if "guided_regex" in asked:
            return self._kept(b'{"regex":' + asked["guided_regex"] + b"}")
        if "structured_outputs" in asked:
            return self._kept(asked["structured_outputs"])
        return UNBOUNDED if asked else self._of_job

    def _held(self, outputs: bytes) -> AnswerLength:
        """Return the maximum length of an answer with `outputs`, a value of structured_outputs in JSON."""
        try:
            asked = msgspec.json.decode(outputs, type=_Outputs)
            if (choices := bytes(asked.choice)) not in (b"", b"null"):
                tokens = self._counter.longest(choices)
                return AnswerLength(
                    tokens, min(tokens, decisions(msgspec.json.decode(choices, type=list[str])))
                )
            if bytes(asked.regex) not in (b"", b"null"):
                length = longest_match(msgspec.json.decode(bytes(asked.regex), type=str))
                return AnswerLength(length, length)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass  # the line gets an error in the run
        return UNBOUNDED


def decisions(texts: list[str]) -> int:
    """Return the maximum number of places in one of `texts` where another text with the same beginning differs."""
    ordered = sorted(set(texts))
    common = [_common(*two) for two in pairwise(ordered)]
    before, behind = _lower(common), _lower(common[::-1])[::-1]
    return max((len(one | other) for one, other in zip(before, behind, strict=True)), default=0) or 1


def _common(one: str, other: str) -> int:
    """Return the number of characters at the beginning that two texts have in common."""
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))


def _lower(common: list[int]) -> list[frozenset[int]]:
    """For each of some sorted texts, the places at which earlier ones differ from it.

    `common` has the result of `_common` for each pair of neighbours.
    """
    found, stack = [frozenset[int]()], list[int]()
    for length in common:
        while stack and stack[-1] >= length:
            stack.pop()
        stack.append(length)
        found.append(frozenset(stack))
    return found


def longest_match(pattern: str) -> int:
    """Return an upper bound of the characters that a regular expression matches; UNKNOWN if there is no bound."""
    if "{," in pattern:  # its meaning differs between libraries
        return UNKNOWN
    # For each open group: characters of its longest finished branch, and of the current branch.
    last, open_groups = 0, [[0, 0]]
    for part in _PARTS.finditer(pattern):
        group = open_groups[-1]
        if times := part["count"] or part["most"]:
            more = last * int(times[:9])
            group[1] += max(more - last, 0)
            last = max(more, last)
        elif part[0] in ("*", "+") or part[0] == "{":
            return UNKNOWN
        elif part[0] == "(":
            open_groups.append([0, 0])
        elif part[0] == ")" and len(open_groups) > 1:
            last = max(open_groups.pop())
            open_groups[-1][1] += last
        elif part[0] == "|":
            open_groups[-1] = [max(group), 0]
        elif part[0] not in "?^$":
            last = 1
            group[1] += 1
    return min(max(open_groups[-1]), UNKNOWN)
