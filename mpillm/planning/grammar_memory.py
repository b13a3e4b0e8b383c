"""What grammars take on rank 0: known before a run, by the keys of its lines that hold an answer to one."""

from __future__ import annotations

import hashlib

import msgspec

from mpillm.spec import Spec
from mpillm.text.constrain import CACHED, MAX_LENGTH

# Bytes while a grammar is compiled, and for each of its characters (22 MiB, 75 measured).
COMPILING, CHARACTER = (
    24 * 2**20,
    96,
)
# Bytes of a compiled grammar and its states, and for each of its characters (214 measured).
HELD, HELD_CHARACTER = (
    2**20,
    288,
)
DIVISOR = 14 * 2**20  # of a compiled one with "multipleOf" at its largest (12 MiB measured)

MANY = 1 << 14  # grammars that are told apart

# Values of tool_choice that force no call.
_NO_CALL = frozenset({b"", b"null", b'"auto"', b'"none"'})
_KEYS = ("response_format", "structured_outputs")


class Asked(msgspec.Struct):
    """The keys of a body that may hold its answer to a grammar."""

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

    compiling: int = 0  # bytes while one is compiled; 0 if there are none
    largest: int = 0  # bytes of one that is compiled, at most
    together: int = 0  # bytes of all of them

    def kept(self, at_once: int) -> int:
        """Bytes, while so many requests use one each."""
        return self.compiling + min(self.together, (CACHED + at_once) * self.largest)


NO_GRAMMARS = GrammarNeeds()


class GrammarCounter:
    """Counts the grammars of an input."""

    def __init__(self, spec: Spec) -> None:
        self._seen: set[bytes] = set()  # digests of different ones
        self._longest = self._largest = self._together = 0
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
        length = min(len(grammar), MAX_LENGTH)
        held = HELD + HELD_CHARACTER * length + (DIVISOR if b"multipleOf" in grammar else 0)
        self._longest, self._largest = max(self._longest, length), max(self._largest, held)
        self._together += held

    def needs(self) -> GrammarNeeds:
        """What they take."""
        if not self._together:
            return GrammarNeeds()
        return GrammarNeeds(COMPILING + CHARACTER * self._longest, self._largest, self._together)
