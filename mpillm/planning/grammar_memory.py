"""What grammars take on rank 0: known before a run, by the keys of its lines that hold an answer to one."""

from __future__ import annotations

import hashlib
import math
import re

import msgspec

from mpillm.spec import Spec
from mpillm.text.constrain import CACHED, MAX_LENGTH
from mpillm.text.schema_checks import MAX_MULTIPLE, remainders

# Bytes of a vocabulary's entry among what the library knows of the tokenizer (700 measured from 50,000 entries on; 1020
# while it is made, before rows and the cache take what is planned for them).
WORD = 720
FIRST = 4 * 2**20  # bytes that the first grammar takes besides, with its thread's stack
# Bytes of a compiled grammar with the states of its lexer (60,000 measured of a few choices, 200,000 of a schema of 6
# properties, 6 MB of a pattern that counts to thousands), for each of its characters, and for each state.
HELD, HELD_CHARACTER, STATE, STATES = 1 << 16, 320, 2048, 3072
REMAINDER = 544  # of each remainder that "multipleOf" tells apart (525 measured)

MANY = 1 << 14  # grammars that are told apart

# Values of tool_choice that force no call.
_NO_CALL = frozenset({b"", b"null", b'"auto"', b'"none"'})
_KEYS = ("response_format", "structured_outputs")
_MULTIPLE = re.compile(rb'"multipleOf"\s*:\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)')
_COUNTED = re.compile(rb'\{\d*,?(\d{1,9})\}|"maxLength"\s*:\s*(\d{1,9})')


class Asked(msgspec.Struct):
    """The keys of a body that can constrain its answer by a grammar."""

    response_format: msgspec.Raw = msgspec.Raw()
    structured_outputs: msgspec.Raw = msgspec.Raw()
    guided_json: msgspec.Raw = msgspec.Raw()
    guided_regex: msgspec.Raw = msgspec.Raw()
    guided_choice: msgspec.Raw = msgspec.Raw()
    guided_grammar: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    tool_choice: msgspec.Raw = msgspec.Raw()


class GrammarNeeds(msgspec.Struct, frozen=True):
    """What the grammars of an input take."""

    largest: int = 0  # bytes of one that is compiled, at most
    together: int = 0  # bytes of all of them

    def kept(self, at_once: int, vocab: int) -> int:
        """Bytes, while so many requests use one each, of a model with `vocab` tokens."""
        if not self.together:
            return 0
        return FIRST + WORD * vocab + min(self.together, (CACHED + at_once) * self.largest)


NO_GRAMMARS = GrammarNeeds()


class GrammarCounter:
    """Counts the grammars of an input."""

    def __init__(self, spec: Spec) -> None:
        self._seen: set[bytes] = set()  # digests of different ones
        self._largest = self._together = 0
        job = [getattr(spec.sampling, key) for key in _KEYS]
        self._add(b"".join(msgspec.json.encode(one) for one in job if one is not None))

    def add(self, body: Asked) -> None:
        """Take note of what a line asks for."""
        given = {key: bytes(getattr(body, key)) for key in Asked.__struct_fields__}
        tools, choice = given.pop("tools"), given.pop("tool_choice")
        if given["response_format"].replace(b" ", b"") == b'{"type":"text"}':
            del given["response_format"]
        if choice not in _NO_CALL or b'"strict"' in tools:
            given["tools"] = tools
        self._add(b"".join(one for one in given.values() if one != b"null"))

    def _add(self, grammar: bytes) -> None:
        """Take note of a grammar as JSON; nothing of none. What is beyond MANY is counted as different."""
        digest = hashlib.blake2b(grammar, digest_size=8).digest()
        if not grammar or digest in self._seen:
            return
        if len(self._seen) < MANY:
            self._seen.add(digest)
        held = compiled_bytes(grammar)
        self._largest = max(self._largest, held)
        self._together += held

    def needs(self) -> GrammarNeeds:
        """What they take."""
        return GrammarNeeds(self._largest, self._together)


def compiled_bytes(grammar: bytes) -> int:
    """Bytes of a compiled grammar, which is given as JSON, with the states that answers lead its lexer to."""
    multiple = 1
    for found in _MULTIPLE.findall(grammar):
        multiple = min(math.lcm(multiple, remainders(float(found))), MAX_MULTIPLE)
    counted = sum(int(repeats or length) for repeats, length in _COUNTED.findall(grammar))
    held = HELD + HELD_CHARACTER * min(len(grammar), MAX_LENGTH) + STATE * min(counted, STATES)
    return held + REMAINDER * multiple
