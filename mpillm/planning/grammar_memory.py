"""Compute the memory of grammars on rank 0 before a run, from the keys of the input's lines that constrain answers."""

from __future__ import annotations

import hashlib
import math
import re

import msgspec

from mpillm.spec import Spec
from mpillm.text.constrain import CACHED, MAX_LENGTH
from mpillm.text.schema_checks import MAX_MULTIPLE, remainders

# Bytes of each entry of the vocabulary in the library's copy of the tokenizer. Measured: 700 with 50,000 entries and
# more, and 1020 while the copy is made, when rows and the cache do not use their memory yet.
WORD = 720
FIRST = 4 * 2**20  # additional bytes for the first grammar, with the stack of its thread
# Bytes of a compiled grammar with the states of its lexer: HELD, HELD_CHARACTER for each character, and STATE for each
# of up to STATES states. Measured: 60,000 bytes for a few choices, 200,000 for a schema of 6 properties, and 6 MB for a
# pattern with counts of thousands.
HELD, HELD_CHARACTER, STATE, STATES = 1 << 16, 320, 2048, 3072
REMAINDER = 544  # bytes for each remainder of "multipleOf" (525 measured)

MANY = 1 << 14  # different grammars that are told apart

# Values of tool_choice with which an answer need not be a call.
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
    """The memory of the grammars of an input."""

    largest: int = 0  # maximum bytes of one compiled grammar
    together: int = 0  # bytes of all compiled grammars

    def kept(self, at_once: int, vocab: int) -> int:
        """Return bytes kept while `at_once` requests use a grammar each, with a vocabulary of `vocab` tokens."""
        if not self.together:
            return 0
        return FIRST + WORD * vocab + min(self.together, (CACHED + at_once) * self.largest)


NO_GRAMMARS = GrammarNeeds()


class GrammarCounter:
    """Counts the grammars of an input."""

    def __init__(self, spec: Spec) -> None:
        self._seen: set[bytes] = set()  # digests of the different grammars
        self._largest = self._together = 0
        job = [getattr(spec.sampling, key) for key in _KEYS]
        self._add(b"".join(msgspec.json.encode(one) for one in job if one is not None))

    def add(self, body: Asked) -> None:
        """Count the grammar of a line, if it asks for one."""
        given = {key: bytes(getattr(body, key)) for key in Asked.__struct_fields__}
        tools, choice = given.pop("tools"), given.pop("tool_choice")
        if given["response_format"].replace(b" ", b"") == b'{"type":"text"}':
            del given["response_format"]
        if choice not in _NO_CALL or b'"strict"' in tools:
            given["tools"] = tools
        self._add(b"".join(one for one in given.values() if one != b"null"))

    def _add(self, grammar: bytes) -> None:
        """Count a grammar in JSON, unless it is empty or known; after the first MANY, each counts as a new one."""
        digest = hashlib.blake2b(grammar, digest_size=8).digest()
        if not grammar or digest in self._seen:
            return
        if len(self._seen) < MANY:
            self._seen.add(digest)
        held = compiled_bytes(grammar)
        self._largest = max(self._largest, held)
        self._together += held

    def needs(self) -> GrammarNeeds:
        """Return the memory of all grammars that were counted."""
        return GrammarNeeds(self._largest, self._together)


def compiled_bytes(grammar: bytes) -> int:
    """Return bytes of a compiled grammar, given in JSON, with the states of its lexer that answers reach."""
    multiple = 1
    for found in _MULTIPLE.findall(grammar):
        multiple = min(math.lcm(multiple, remainders(float(found))), MAX_MULTIPLE)
    counted = sum(int(repeats or length) for repeats, length in _COUNTED.findall(grammar))
    held = HELD + HELD_CHARACTER * min(len(grammar), MAX_LENGTH) + STATE * min(counted, STATES)
    return held + REMAINDER * multiple
