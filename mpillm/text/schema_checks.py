"""Check a JSON schema before it becomes a grammar: its size, and whether anything can obey it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from mpillm.errors import RequestError

MAX_VALUES = 100_000  # the maximum number of values in a schema
MAX_PATTERN = 1 << 14  # characters of a regular expression, or of all in a schema
MAX_REPEATED = 1 << 16  # copies of its parts that a regular expression asks for at least, or all in a schema
MAX_REFERENCES = 8000  # "$ref" in a schema
MAX_MULTIPLE = 30_000  # the least common multiple of all "multipleOf" in a schema, without factors of 2 and 5
MAX_DEPTH = 100  # levels of a schema, and schemas, that are looked at to see whether a value ends
MAX_LOOKS = 1_000_000

_PARTS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(?P<count>\d+)(?:,\d*)?\}|.", re.DOTALL)


def check_maximum(what: str, count: int, maximum: int) -> None:
    """Raise RequestError if there are more than that."""
    if count > maximum:
        raise RequestError(f"there are {count} {what}; the maximum is {maximum}")


def check_pattern(pattern: str) -> None:
    """Raise RequestError if a regular expression is too long, or asks for too many copies of its parts."""
    check_maximum("characters of the regular expression", len(pattern), MAX_PATTERN)
    check_repeated("the regular expression", repeated(pattern))


def check_repeated(what: str, copies: int) -> None:
    """Raise RequestError if there are more than MAX_REPEATED copies of parts in what has them."""
    if copies > MAX_REPEATED:
        raise RequestError(f"{what} asks for more than {MAX_REPEATED} copies of its parts")


def repeated(pattern: str) -> int:
    """Return the number of copies of parts that a regular expression or grammar has, by the lower number in braces.

    MAX_REPEATED + 1 at most of each part.
    """
    sums, last = [0], 0
    for part in _PARTS.finditer(pattern):
        if part["count"]:
            more = min(last * int(part["count"][:9]), MAX_REPEATED + 1)
            sums[-1] += more - last
            last = more
        elif part[0] == "(":
            sums.append(0)
        elif part[0] == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif part[0] not in "|?*+":
            last = 1
            sums[-1] += 1
    return sum(sums)


def check_schema(schema: Any) -> None:
    """Raise RequestError if a schema has more references, or longer patterns or divisors, than llguidance can take."""
    references: list[Any] = []
    characters = values = copies = 0
    multiple = 1
    left = [schema]
    while left:
        value = left.pop()
        values += 1
        if values > MAX_VALUES:
            break
        if isinstance(value, dict):
            references += [value["$ref"]] if "$ref" in value else []
            patterns = [value.get("pattern"), *(value.get("patternProperties") or ())]
            texts = [pattern for pattern in patterns if isinstance(pattern, str)]
            characters += sum(map(len, texts))
            if characters <= MAX_PATTERN:
                copies += sum(map(repeated, texts))
            multiple = min(math.lcm(multiple, remainders(value.get("multipleOf"))), MAX_MULTIPLE + 1)
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    check_maximum("values in the schema", values, MAX_VALUES)
    check_maximum("references ($ref) in the schema", len(references), MAX_REFERENCES)
    check_maximum("characters of patterns in the schema", characters, MAX_PATTERN)
    check_repeated("a pattern of the schema", copies)
    if multiple > MAX_MULTIPLE:
        raise RequestError(
            "multipleOf is too large: numbers of the schema have a least common multiple above "
            f"{MAX_MULTIPLE}, without factors of 2 and 5"
        )
    if references:
        _Ends(schema).check(references)


def remainders(divisor: Any) -> int:
    """Return the number of remainders with which the library finds multiples of the decimal number `divisor`."""
    if isinstance(divisor, bool) or not isinstance(divisor, (int, float)) or not math.isfinite(divisor):
        return 1
    number = abs(divisor if isinstance(divisor, int) else Fraction(repr(divisor)).numerator)
    for factor in (2, 5):
        while number and number % factor == 0:
            number //= factor
    return number or 1


class _Ends:
    """Whether a schema is obeyed by some value that ends: one that must contain itself is not.

    What lies deeper than MAX_DEPTH, or behind MAX_LOOKS, is left to the library.
    """

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._left = MAX_LOOKS
        self._ending: set[str] = set()  # references to schemas that values can obey

    def check(self, references: Iterable[Any]) -> None:
        """Raise RequestError if no value that ends obeys the schema, in which there are these references."""
        left = list(dict.fromkeys(name for name in references if isinstance(name, str)))
        before = -1
        while before != len(self._ending):
            before = len(self._ending)
            self._ending.update(name for name in left if self._ends(self._target(name), 0))
            left = [name for name in reversed(left) if name not in self._ending]
        if not self._ends(self._schema, 0):
            raise RequestError("no finite value obeys the schema: each value must contain another one")

    def _target(self, name: str) -> Any:
        """Return the part of the schema that a reference names; True, which anything obeys, if that is not known."""
        if name != "#" and not name.startswith("#/"):
            return True
        found = self._schema
        for part in name.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or key not in found:
                return True
            found = found[key]
        return found

    def _ends(self, schema: Any, depth: int) -> bool:
        self._left -= 1
        if not isinstance(schema, dict) or depth > MAX_DEPTH or self._left < 0:
            return True
        name = schema.get("$ref")
        if isinstance(name, str) and name not in self._ending:
            return False
        for key in ("anyOf", "oneOf"):
            ways = schema.get(key)
            if isinstance(ways, list) and ways and not any(self._ends(way, depth + 1) for way in ways):
                return False
        every = schema.get("allOf")
        if isinstance(every, list) and not all(self._ends(one, depth + 1) for one in every):
            return False
        kind = schema.get("type")
        if kind == "object":
            properties, required = schema.get("properties"), schema.get("required")
            if isinstance(properties, dict) and isinstance(required, list):
                keys = (key for key in required if isinstance(key, str))
                return all(self._ends(properties.get(key), depth + 1) for key in keys)
        elif kind == "array" and "prefixItems" not in schema:
            minimum = schema.get("minItems")
            return not (isinstance(minimum, int) and minimum > 0) or self._ends(
                schema.get("items"), depth + 1
            )
        return True
