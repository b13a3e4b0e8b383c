"""Lines of an input that are drawn by a grammar: bodies of all endpoints, and what may be wrong with them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from mpillm.batch import other_keys
from mpillm.batch.endpoints import ENDPOINTS

# Keys that mean something somewhere, and some that do not.
KEYS = sorted(
    {
        *other_keys.IGNORED,
        *other_keys.NEUTRAL,
        *other_keys.REFUSED,
        *(key for endpoint in ENDPOINTS for key in endpoint.__struct_fields__),
        *(
            "role",
            "content",
            "type",
            "text",
            "custom_id",
            "url",
            "body",
            "max_new_tokens",
            "",
            "k" * 300,
            "\0",
        ),
    }
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    20,
    21,
    1024,
    1025,
    4096,
    2**31 - 1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.0,
    0.5,
    1.0,
    1e-9,
    1e308,
)
ROLES = ("user", "assistant", "system", "tool", "developer", "function", "ipython", "", "User", "\N{SNOWMAN}")
PIECES = (
    "the quick brown fox", " ", "\n", "a", "0", "<", "</s>", "<s>", "<|im_end|>", "<|im_start|>user\n", "<|eot_id|>",
    "[INST]", "caf\u00e9", "\u6f22\u5b57", "\U0001f600", "\u0301", "\ufdd0", "\uffff", "\0", "\x1b[2J", "{{ 7 * 7 }}",
    "{% for x in y %}", "\u200b", "\r", "\t", "'", '"', "\\", "<think>", "</think>", "\u2581", "word ",
)  # fmt: skip
# Keys with values that endpoints take.
GOOD: tuple[tuple[str, Any], ...] = (
    ("n", 2), ("logprobs", 1), ("logprobs", True), ("top_logprobs", 3), ("echo", True), ("stop", ["fox", "a"]),
    ("seed", 7), ("temperature", 0.5), ("top_k", 5), ("top_p", 0.9), ("ignore_eos", True), ("return_token_ids", True),
    ("stop_token_ids", [5]), ("chat_template_kwargs", {"enable_thinking": False}), ("encoding_format", "float"),
    ("pooling", "mean"), ("add_special_tokens", False), ("model", "some"), ("repetition_penalty", 1.1), ("user", "me"),
)  # fmt: skip
DEPTHS = (1, 3, 60, 70, 500, 20_000)
LENGTHS = (0, 1, 1, 2, 2, 3, 7, 7, 20, 60, 200)
LONG = (5_000, 100_000, 1_000_000)  # pieces of a text, or values of a list; seldom
MOST = 1_000_000  # of them in a line


class Draw:
    """Draws by the bytes of a case as long as there are any, so that a fuzzer can learn what they do."""

    def __init__(self, data: bytes) -> None:
        self.budget = MOST
        self._left = iter(data)
        self._random = random.Random(hashlib.blake2b(data).digest())

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        byte = next(self._left, None)
        return self._random.randrange(count) if byte is None or count > 256 else byte % count

    def one(self, values: Any) -> Any:
        """One of the values."""
        return values[self.below(len(values))]

    def often(self, percent: int) -> bool:
        """True so often."""
        return self.below(100) < percent


def line(draw: Draw) -> bytes:
    """A line: a good one, in which some things are then changed."""
    content = _content(draw)
    for _ in range(draw.one((0, 0, 0, 0, 1, 1, 2, 5))):
        content = _changed(draw, content)
    raw = json.dumps(content, ensure_ascii=draw.often(50)).encode(errors="surrogatepass")
    if draw.often(5):
        at = draw.below(len(raw) + 1)
        raw = raw[:at] + draw.one((b"\xff", b"{", b'"', b"]", b"\\", b"NaN", b"\x00", b"1e999")) + raw[at:]
    return raw.replace(b"\n", b" ")


def _content(draw: Draw) -> Any:
    endpoint = draw.one(ENDPOINTS)
    body: dict[str, Any] = {endpoint.key: _messages(draw) if endpoint.key == "messages" else _prompt(draw)}
    known = [pair for pair in GOOD if pair[0] in endpoint.__struct_fields__]
    body |= dict(draw.one(known) for _ in range(draw.below(4)))
    if draw.often(10):
        body[draw.one(KEYS)] = _value(draw)
    if draw.often(30):
        body["max_tokens"] = draw.one((0, 1, 5, 100, 10_000))
    if draw.often(50):
        return body
    name = _text(draw) if draw.often(10) else f"r{draw.below(1000)}"
    return {"custom_id": name, "method": "POST", "url": endpoint.url, "body": body}


def _messages(draw: Draw) -> list[Any]:
    return [
        _message(draw) for _ in range(draw.one((1, 1, 2, 3, 5)) if not draw.often(1) else draw.one(LENGTHS))
    ]


def _message(draw: Draw) -> dict[str, Any]:
    message: dict[str, Any] = {"role": draw.one(ROLES[:3] if draw.often(80) else ROLES)}
    if draw.often(95):
        parts = [{"type": "text", "text": _text(draw)} for _ in range(draw.below(3))]
        message["content"] = _text(draw) if draw.often(75) else draw.one((parts, None, _value(draw)))
    if draw.often(5):
        message[draw.one((*KEYS, "tool_calls", "name", "reasoning_content"))] = _value(draw)
    return message


def _prompt(draw: Draw) -> Any:
    if draw.often(50):
        return _text(draw)
    if draw.often(50):
        return _repeated(draw, lambda: draw.below(300))
    return _repeated(
        draw, lambda: _text(draw) if draw.often(50) else [draw.below(320) for _ in range(draw.below(20))]
    )


def _repeated(draw: Draw, one: Callable[[], Any]) -> list[Any]:
    """A list of values that begins anew after some of them, so that a long one is made quickly."""
    count = _many(draw)
    few = [one() for _ in range(min(count, 20))]
    return (few * (count // 20 + 1))[:count]


def _many(draw: Draw) -> int:
    count = min(draw.one(LONG) if draw.below(1000) == 999 else draw.one(LENGTHS), draw.budget)
    draw.budget -= count
    return int(count)


def _text(draw: Draw) -> str:
    count = _many(draw)
    if count > 60:
        return str(draw.one(PIECES)) * count
    return "".join(draw.one(PIECES) for _ in range(count)) + ("\ud800" if draw.below(200) == 199 else "")


def _value(draw: Draw, depth: int = 3) -> Any:
    kind = draw.below(9)
    if kind < 3 or not depth:
        return draw.one((None, True, False, *NUMBERS))
    if kind < 5:
        return _text(draw)
    if kind == 5:
        return _nested(draw)
    if kind == 6:
        return [draw.one(NUMBERS)] * _many(draw)
    if kind == 7:
        return [_value(draw, depth - 1) for _ in range(draw.below(4))]
    return {draw.one(KEYS): _value(draw, depth - 1) for _ in range(draw.below(4))}


def _nested(draw: Draw) -> Any:
    """Lists or objects in each other, no deeper than json can write them."""
    value: Any = 1
    for _ in range(min(draw.one(DEPTHS), 900)):
        value = [value] if draw.often(50) else {"a": value}
    return value


def _changed(draw: Draw, content: Any) -> Any:
    """The content with one value in it replaced, removed or added."""
    if not isinstance(content, dict | list) or not content or draw.often(20):
        return _value(draw) if draw.often(30) else content
    if isinstance(content, list):
        at = draw.below(len(content))
        return [*content[:at], *([_changed(draw, content[at])] * draw.one((0, 1, 1, 2))), *content[at + 1 :]]
    key = draw.one(list(content))
    match draw.below(4):
        case 0:
            return {name: value for name, value in content.items() if name != key}
        case 1:
            return content | {draw.one(KEYS): _value(draw)}
        case _:
            return content | {key: _changed(draw, content[key])}
